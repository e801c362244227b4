"""transformers' `generate` with a static cache and `torch.compile`, weights frozen into the compiled code."""

from peers import Peer
from peers.transformers_inductor import build, prepare

__all__ = ["PEER", "build", "prepare"]

PEER = Peer(
    "transformers, Inductor, static cache, frozen weights", copies=2, environment={"TORCHINDUCTOR_FREEZING": "1"}
)
