"""The decoders that the benchmark measures, one module each.

A peer's module has `PEER`, `prepare(job)`, which reads or converts the weights and is not timed, and
`build(job, prepared)`, which is: it returns a function from a prompt to a `Timed` generation. The modules import their
libraries inside these functions, because the parent process reads `PEER` of all of them.
"""

import importlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType

from shapes import Shape

from accelc.demo.contenders import Timed

NAMES = (
    "accelc",
    "transformers_eager",
    "transformers_inductor",
    "transformers_inductor_frozen",
    "llama_cpp",
    "ctranslate2",
    "torchao",
)


@dataclass(frozen=True)
class Job:
    """What to decode: a transformers directory of `shape` in `dtype`; `work` is a directory for converted files."""

    path: Path
    shape: Shape
    dtype: str
    max_length: int
    threads: int
    work: Path


@dataclass(frozen=True)
class Peer:
    """What the benchmark must know of a peer before it starts it."""

    title: str
    requires: tuple[str, ...] = ()  # modules beyond accelc's own
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    copies: float = 1.0  # copies of the weights in memory when it is at work
    environment: Mapping[str, str] = field(default_factory=dict)  # set before its process starts
    lossy: bool = False  # computes with other weights: its tokens and bytes are not comparable

    def missing(self, dtype: str) -> str | None:
        """Why it cannot be measured, or None."""
        absent = [name for name in self.requires if importlib.util.find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)}"
        return None if dtype in self.dtypes else f"no {dtype}"


def load(name: str) -> ModuleType:
    """The module of a peer."""
    return importlib.import_module(f"peers.{name}")


def timed(tokens: Iterator[int], new_tokens: int) -> Timed:
    """Take `new_tokens` tokens from an iterator that makes them one by one."""
    started = time.perf_counter()
    times, result = [], []
    for token in islice(tokens, new_tokens):
        times.append(time.perf_counter() - started)
        result.append(int(token))
    return Timed(tuple(result), first_token_seconds=times[0], total_seconds=times[-1])
