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

from shapes import SCHEMES, Shape

from accelc.demo.contenders import Timed

NAMES = (
    "accelc",
    "transformers_eager",
    "transformers_inductor",
    "transformers_inductor_frozen",
    "llama_cpp",
    "llama_cpp_q4_k_m",
    "ctranslate2",
    "openvino",
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

    @property
    def quantized(self) -> bool:
        """Whether weights are decoded in few bits: then every peer rounds them in its own way."""
        return self.dtype in SCHEMES


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


class Clock:
    """The tokens of one generation and when each came, counted from the clock's making."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []

    def add(self, token: int) -> None:
        """A token is here now."""
        self.times.append(time.perf_counter() - self._started)
        self.tokens.append(int(token))

    def timed(self, new_tokens: int) -> Timed:
        """The generation; raises ValueError if it has not exactly `new_tokens` tokens."""
        if len(self.tokens) != new_tokens:
            raise ValueError(f"{len(self.tokens)} tokens were decoded, {new_tokens} were asked for")
        return Timed(tuple(self.tokens), first_token_seconds=self.times[0], total_seconds=self.times[-1])


def timed(tokens: Iterator[int], new_tokens: int) -> Timed:
    """Take `new_tokens` tokens from an iterator that makes each one when it is asked for it, not ahead."""
    clock = Clock()
    for token in islice(tokens, new_tokens):
        clock.add(token)
    return clock.timed(new_tokens)
