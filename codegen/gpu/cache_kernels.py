"""The Triton kernel that writes new rows into a cache; `accelc.codegen.gpu.cache` launches it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cache_update_kernel(
    cache_ptr, value_ptr, lengths_ptr, OUTER, SLOTS, N,
    ROW: tl.constexpr, ROW_PADDED: tl.constexpr,
):  # fmt: skip
    """cache [B, OUTER, SLOTS, ROW] at slot lengths[b] + n gets value [B, OUTER, N, ROW] at n, both contiguous. The grid
    is (N, B * OUTER).
    """
    new, outer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(lengths_ptr + outer // OUTER).to(tl.int64) + new
    at = tl.arange(0, ROW_PADDED)
    row = tl.load(value_ptr + (outer * N + new) * ROW + at, mask=at < ROW, other=0.0)
    # The caller guarantees that the slot is there; memory of others is not written in any case.
    most = tl.where(slot < SLOTS, ROW, 0)
    tl.store(cache_ptr + (outer * SLOTS + slot) * ROW + at, row.to(cache_ptr.dtype.element_ty), mask=at < most)
