"""transformers' model with a static cache and `torch.compile`, weights frozen into the compiled code and packed."""

from typing import Any

from peers import Job, Peer
from peers.transformers_eager import prepare

__all__ = ["PEER", "build", "prepare"]

PEER = Peer("Inductor, frozen weights", copies=2, environment={"TORCHINDUCTOR_FREEZING": "1"})


def build(job: Job, prepared: Any) -> Any:
    from peers.static_loop import static_loop

    return static_loop(prepared, job.max_length)
