"""Huge pages for weights.

A step reads every weight once, so each page of 4 KiB costs a walk of the page table, two-dimensional in a virtual
machine. Measured on a virtual Zen 4 machine, two threads: plain reads 35 GB/s from small pages, 60 GB/s from pages of
2 MiB. Weights stay where they are: the kernel exchanges the pages under them, in 0.3 s a gigabyte.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable

from torch import Tensor

HUGE = 2 << 20
CHUNK = 32 * HUGE
"""One request: other threads that map memory wait for it."""
MADV_COLLAPSE = 25
"""Since Linux 6.1. Older kernels answer EINVAL and the pages stay as they are."""


def spans(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(begin, end) of the huge pages that [begin, end) extents touch, merged where they meet."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((a // HUGE * HUGE, -(-b // HUGE) * HUGE) for a, b in extents if b > a):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Ask for huge pages under the storages of CPU tensors; returns the bytes that have them. Contents and addresses
    stay the same, and others may read meanwhile. What cannot be exchanged, such as a mapped file, stays as it is.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    storages = [t.untyped_storage() for t in tensors]
    done = 0
    for begin, end in spans((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        for at in range(begin, end, CHUNK):
            size = min(CHUNK, end - at)
            if madvise(at, size, MADV_COLLAPSE) == 0:
                done += size
            else:  # some page of it cannot be exchanged: try one by one
                done += sum(HUGE for page in range(at, at + size, HUGE) if madvise(page, HUGE, MADV_COLLAPSE) == 0)
    return done


def use_huge_pages_soon(tensors: Iterable[Tensor], done: Callable[[int], None]) -> threading.Thread:
    """The same beside the caller's work; `done` gets the bytes."""
    kept = list(tensors)  # alive until the thread ends
    thread = threading.Thread(target=lambda: done(use_huge_pages(kept)), name="accelc-huge-pages", daemon=True)
    thread.start()
    return thread
