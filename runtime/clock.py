"""Moments on a device, taken without waiting for it; and the host's time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Mark: TypeAlias = Any
"""A moment, of the clock that made it."""


class Clock(Protocol):
    """Takes marks, and tells the time between them."""

    def mark(self) -> Mark:
        """The moment when all that was asked of the device so far is done."""

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """Seconds from each mark to the next; the host must have waited for the last."""


class HostClock:
    """For devices that have done what was asked when the call returns."""

    mark = staticmethod(perf_counter)

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        return [end - begin for begin, end in pairwise(marks)]


class CudaClock:
    """Events in the current stream of a GPU."""

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


class Stopwatch:
    """Host time, with that of compiling told apart: a decoder compiles when sizes or drafters come up first."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Spent compiling so far."""
        self._began, self._depth = 0.0, 0

    def now(self) -> float:
        """Seconds, which do not pass while something is compiled."""
        return perf_counter() - self.seconds

    def __enter__(self) -> Stopwatch:
        if not self._depth:
            self._began = perf_counter()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += perf_counter() - self._began

    def timed(self, compiler: Callable[P, R]) -> Callable[P, R]:
        """Something that compiles, with its time counted here."""

        @functools.wraps(compiler)
        def compile(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return compiler(*args, **kwargs)

        return compile
