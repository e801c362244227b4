"""`accelc::cache_update` on a GPU."""

from __future__ import annotations

import math

import triton
from torch import Tensor

from . import cache_kernels as kernels

WIDEST = 1 << 14
"""Elements of a row that one program writes."""


def takes(cache: Tensor, dim: int) -> bool:
    """Whether the kernel writes to such a cache."""
    return cache.is_contiguous() and math.prod(cache.shape[dim + 1 :]) <= WIDEST


def cache_update_gpu(cache: Tensor, value: Tensor, lengths: Tensor, dim: int) -> None:
    """`accelc::cache_update` by the kernel, for caches that it `takes`."""
    outer, row = math.prod(cache.shape[1:dim]), math.prod(cache.shape[dim + 1 :])
    n = value.shape[dim]
    kernels.cache_update_kernel[(n, cache.shape[0] * outer)](
        cache, value.contiguous(), lengths, outer, cache.shape[dim], n,
        ROW=row, ROW_PADDED=triton.next_power_of_2(row),
        num_warps=1 if row <= 256 else 4,
    )  # fmt: skip
