"""The read bandwidth of this machine's memory, measured now: the limit that decoding one sequence is compared with.

Machines flip between levels for minutes at a time, so read it right before and after each sample and report the ratio:

    python -m benchmarks.bandwidth            # prints a few readings
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from accelc.codegen.native import library
from accelc.codegen.pages import PageExchange

BYTES = 1 << 29
"""Size of the buffer read: far beyond any cache, about 10 ms."""
STREAMS = (1, 4)
"""Streams that a thread reads at once; the best counts: on Zen 3 four are 1.3 times as fast as one."""


@dataclass(frozen=True)
class Sample:
    """One timed call beside the bandwidth around it: seconds, bytes that the call must read, bytes a second of the
    memory.
    """

    seconds: float
    bytes: int
    bandwidth: float

    @property
    def ratio(self) -> float:
        """Achieved part of the limit."""
        return self.bytes / self.seconds / self.bandwidth


class Bandwidth:
    """Reads a buffer by plain vector loads on `threads` threads (0: torch's number). Keep one instance: filling the
    buffer takes longer than reading it. It lies on huge pages where the system gives them, as that is what the memory
    can do: small pages were read at 0.6 of it in a virtual machine, and a limit taken from them can be exceeded.
    """

    def __init__(self, size: int = BYTES, threads: int = 0) -> None:
        self._buffer = torch.ones(size // 4096 * 1024)
        PageExchange([self._buffer]).finish()
        self._threads = threads or torch.get_num_threads()
        self._library = library()[0]

    def read(self, repeats: int = 3, streams: Sequence[int] = STREAMS) -> float:
        """Bytes a second, the best of a few reads (a read can be disturbed, but not be too fast)."""
        best = float("inf")
        for _, count in itertools.product(range(repeats), streams):
            started = time.perf_counter()
            self._library.accelc_read(self._buffer.data_ptr(), self._buffer.nbytes, count, self._threads)
            best = min(best, time.perf_counter() - started)
        return self._buffer.nbytes / best

    def sample(self, call: Callable[[], object], read_bytes: int, repeats: int = 3) -> Sample:
        """Time `call` (best of `repeats`) between two readings; the higher reading counts, so a ratio is never
        flattered.
        """
        before = self.read()
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - started)
        return Sample(best, read_bytes, max(before, self.read()))


if __name__ == "__main__":
    meter = Bandwidth()
    for _ in range(5):
        print(f"{meter.read() / 1e9:.1f} GB/s with {torch.get_num_threads()} threads")
