"""transformers' `generate` with torchao's int8 weight-only quantization, a static cache and `torch.compile`."""

from typing import Any

from peers import Job, Peer
from peers.transformers_eager import prepare

__all__ = ["PEER", "build", "prepare"]

PEER = Peer(
    "torchao int8 weights, Inductor",
    requires=("torchao",),
    dtypes=("bf16",),
    environment={"TORCHINDUCTOR_FREEZING": "1"},
    lossy=True,
)


def build(job: Job, prepared: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from accelc.demo.contenders import transformers_inductor

    quantize_(prepared, Int8WeightOnlyConfig())
    return transformers_inductor(prepared)
