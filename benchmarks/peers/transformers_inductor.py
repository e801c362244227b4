"""transformers' `generate` with a static cache and `torch.compile`."""

from typing import Any

from peers import Job, Peer
from peers.transformers_eager import prepare

__all__ = ["PEER", "build", "prepare"]

PEER = Peer("transformers, Inductor")


def build(job: Job, prepared: Any) -> Any:
    from accelc.demo.contenders import transformers_inductor

    return transformers_inductor(prepared)
