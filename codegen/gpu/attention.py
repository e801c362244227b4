"""`accelc::attention` on a GPU: sizes of blocks, and the launch of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import attention_kernels as kernels
from .errors import KernelInputError
from .launch import is_interpreted

LEAST = 16
"""Rows and columns that the matrix instruction takes."""
PROGRAMS = 2
"""Programs a processor that splits are made for."""


@dataclass(frozen=True)
class Blocks:
    """``rows`` (new tokens x query heads of a key head) and ``slots`` of a program at once; over how many programs the
    slots are split.
    """

    rows: int
    slots: int
    splits: int
    warps: int = 4
    stages: int = 2


def choose_blocks(
    batch: int, key_heads: int, rows: int, width: int, capacity: int, processors: int, dtype: torch.dtype,
    amd: bool = False,
) -> Blocks:  # fmt: skip
    """For so many rows of each of `key_heads` heads, keys of `width`, and so many slots.

    Splits fill the chip if all slots are used: a power of two, which is what the joining kernel adds. Blocks are as
    large as registers and shared memory allow for every mask; products in fp32 have no matrix instruction and take the
    most registers.
    """
    exact, wide = dtype == torch.float32, width > 256
    at_once = LEAST if exact or wide or amd else min(64, max(LEAST, triton.next_power_of_2(rows)))
    if wide:
        slots = 16 if exact or amd else 32
    else:
        slots = 64 if width <= 128 and at_once < 64 and not exact and not amd else 32
    warps = 8 if exact or wide or at_once == 64 else 4
    programs = batch * key_heads * triton.cdiv(rows, at_once)
    wanted = PROGRAMS * processors // max(1, programs)
    most = triton.next_power_of_2(triton.cdiv(capacity, slots))
    splits = min(1 << max(0, wanted.bit_length() - 1), most, 64)
    return Blocks(at_once, slots, splits, warps, 1 if exact and amd else 2)


def attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    lengths: Tensor,
    tree: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    mask: str,
    window: int,
    scale: float,
    softcap: float,
    blocks: Blocks | None = None,
) -> Tensor:
    """`accelc::attention` by the kernels: bf16, fp16 or fp32, sums in fp32; weights are rounded to value's dtype.

    Raises KernelInputError for other dtypes.
    """
    b, h, n, d = query.shape
    key_heads, capacity, dv = key.shape[1], key.shape[2], value.shape[3]
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32) or key.dtype != query.dtype:
        raise KernelInputError(f"queries in {query.dtype} and keys in {key.dtype}", where="accelc::attention")
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    group = h // key_heads
    interpreted = is_interpreted(kernels.attention_kernel)
    processors = 4 if interpreted else torch.cuda.get_device_properties(query.device).multi_processor_count
    amd = torch.version.hip is not None
    blocks = blocks or choose_blocks(b, key_heads, n * group, d, capacity, processors, query.dtype, amd)
    if bias is not None:
        bias = bias.expand(b, h, n, capacity)
        bias = bias.view(torch.int8) if bias.dtype == torch.bool else bias
    words = 0 if tree is None else tree.shape[-1]
    parts = torch.empty((b, key_heads, n * group, blocks.splits, dv), dtype=torch.float32, device=query.device)
    sums = torch.empty((b, key_heads, n * group, blocks.splits, 2), dtype=torch.float32, device=query.device)
    kernels.attention_kernel[(triton.cdiv(n * group, blocks.rows), b * key_heads, blocks.splits)](
        query, key, value, positions.contiguous(), lengths, None if tree is None else tree.contiguous(), bias, slopes,
        parts, sums, n, max(window, 1), scale, softcap,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *(bias.stride() if bias is not None else (0,) * 4),
        **constants(key_heads, group, d, dv, words, mask, softcap, blocks, interpreted),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    out = torch.empty((b, n, h, dv), dtype=query.dtype, device=query.device)
    kernels.join_kernel[(n * group, b * key_heads)](
        parts, sums, sinks, out, n,
        KEY_HEADS=key_heads, GROUP=group, DV=dv, DV_PADDED=triton.next_power_of_2(dv), SPLITS=blocks.splits,
        num_warps=join_warps(blocks.splits, dv),
    )  # fmt: skip
    return out.transpose(1, 2)


def join_warps(splits: int, dv: int) -> int:
    """Warps of a program of `join_kernel`: a thread holds at most 64 elements of the parts, 128 where they are many."""
    return min(8, max(1, splits * triton.next_power_of_2(dv) // (32 * 64)))


def constants(
    key_heads: int, group: int, d: int, dv: int, words: int, mask: str, softcap: float, blocks: Blocks,
    interpreted: bool,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments of `attention_kernel`."""
    whole = max(LEAST, 1 << (d.bit_length() - 1))
    left = d - whole
    return {
        "KEY_HEADS": key_heads, "GROUP": group, "D": d, "D0": whole,
        "D1": max(LEAST, triton.next_power_of_2(left)) if left > 0 else 0,
        "DV": dv, "DV_PADDED": max(LEAST, triton.next_power_of_2(dv)), "ROWS": blocks.rows,
        "SLOTS_AT_ONCE": blocks.slots, "SPLITS": blocks.splits, "WORDS": words,
        "MASK": mask, "CAPPED": softcap > 0, "STAGES": blocks.stages, "WIDEN": interpreted,
    }  # fmt: skip
