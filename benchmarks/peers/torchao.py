"""transformers' model with torchao's int8 weight-only quantization, a static cache and `torch.compile`."""

from typing import Any

from accelc.demo.contenders import Generate
from peers import Job, Peer
from peers.transformers_eager import prepare

__all__ = ["PEER", "build", "prepare"]

PEER = Peer(
    "torchao int8, Inductor",
    requires=("torchao",),
    dtypes=("int8",),
    environment={"TORCHINDUCTOR_FREEZING": "1"},
    lossy=True,
)


def build(job: Job, prepared: Any) -> Generate:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from peers.static_loop import static_loop

    quantize_(prepared, Int8WeightOnlyConfig())
    return static_loop(prepared, job.max_length)
