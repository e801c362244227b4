"""llama.cpp with its mixed quantization of 4 to 6 bits, Q4_K_M."""

from pathlib import Path

from peers import Job, Peer
from peers.llama_cpp import build, converted

__all__ = ["PEER", "build", "prepare"]

PEER = Peer("llama.cpp Q4_K_M", requires=("llama_cpp", "gguf"), dtypes=("int4",), lossy=True)


def prepare(job: Job) -> Path:
    """Write the weights as GGUF and quantize them, once."""
    return converted(job, "Q4_K_M")
