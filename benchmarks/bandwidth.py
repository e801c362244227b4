"""The read bandwidth of this machine's memory, measured now: the limit that decoding one sequence is compared with.

Machines flip between levels for minutes at a time, so read it right before and after each sample and report the ratio:

    python benchmarks/bandwidth.py            # prints a few readings
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from accelc.codegen.native import library
from accelc.codegen.pages import PageExchange

BYTES = 1 << 29
"""Size of the buffer read: far beyond any cache, about 10 ms."""
STREAMS = (1, 4)
"""Streams that a thread reads at once; the best counts: on Zen 3 four are 1.3 times as fast as one."""


class Bandwidth:
    """Reads a buffer by plain vector loads on `threads` threads (0: torch's number). Keep one instance: filling the
    buffer takes longer than reading it. It lies on huge pages where the system gives them, as that is what the memory
    can do: small pages were read at 0.6 of it in a virtual machine, and a limit taken from them can be exceeded.
    """

    def __init__(self, size: int = BYTES, threads: int = 0) -> None:
        self._buffer = torch.ones(size // 4096 * 1024)
        PageExchange([self._buffer]).finish()
        self._threads = threads or torch.get_num_threads()
        self._library = library().kernels

    def read(self, repeats: int = 3, streams: Sequence[int] = STREAMS) -> float:
        """Bytes a second, the best of a few reads (a read can be disturbed, but not be too fast)."""
        best = float("inf")
        for _, count in itertools.product(range(repeats), streams):
            started = time.perf_counter()
            self._library.accelc_read(self._buffer.data_ptr(), self._buffer.nbytes, count, self._threads)
            best = min(best, time.perf_counter() - started)
        return self._buffer.nbytes / best

    def share(self, call: Callable[[], object], read_bytes: float, repeats: int = 60) -> float:
        """The part of the memory's bandwidth at which `call` reads `read_bytes`: the median of `repeats`.

        The memory is read between any two calls, and a call compared with the two readings around it: on a machine
        whose memory flips between levels every few seconds, anything longer averages over both.
        """
        shares, before = [], self.read(1)
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            after = self.read(1)
            shares.append(read_bytes / seconds / ((before + after) / 2))
            before = after
        return statistics.median(shares)


if __name__ == "__main__":
    meter = Bandwidth()
    for _ in range(5):
        print(f"{meter.read() / 1e9:.1f} GB/s with {torch.get_num_threads()} threads")
