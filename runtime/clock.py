"""Moments on a device, taken without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol, TypeAlias

import torch

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
