"""Rules for products with, and look-ups in, weights in few bits (accelc.ir.quantized)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from accelc.codegen.arrays import FLOATS, Array, contiguous
from accelc.codegen.instructions import Gemm, Instruction, floats, rule, scratch
from accelc.ir.quantized import LANES

SEGMENT = 128
"""Columns that share a step of the activations' fixed point, where groups of weights are longer."""
PIECE = 2 << 20
"""Bytes of a weight that are dequantized at a time, for a product of torch's: they stay in a cache."""
_TEMPORARY = itertools.count(-(1 << 40), -1)
"""Roots of memory that no value of the program has."""


@rule(torch.ops.accelc.quantized_linear.default)
def quantized_linear(
    out: Array, x: Array, codes: Array, scales: Array, zeros: Array | None, bias: Array | None, bits: int, rows: int
) -> Sequence[Instruction] | None:
    given, into = x.matrix(), out.matrix()
    if given is None or into is None or not (given.unit and into.unit) or (bias and not bias.unit):
        return None
    if codes.ndim != 3 or not floats(x, out, bias) or scales.dtype not in FLOATS:
        return None
    padded = codes.size[1] * 32 // bits
    group = padded // scales.size[1]
    segment = group if group <= 256 else SEGMENT
    count = -(-padded // segment)
    # The kernel may keep 16 bits where 8 would do, and lays segments out at their full length.
    memory = scratch(given.size[0] * count * (2 + segment // 2))
    arrays = (given, codes, scales, zeros, bias, into, memory)
    return [Instruction("quantized_linear", arrays, (5, 6), (bits, segment, 16))]


@rule(torch.ops.accelc.quantized_embedding.default)
def quantized_embedding(
    out: Array, ids: Array, codes: Array, scales: Array, zeros: Array | None, bits: int, columns: int, dtype: Any
) -> Sequence[Instruction] | None:
    flat = ids.matrix(inner=0)
    if flat is None or ids.dtype != torch.int64 or not floats(out, scales, zeros) or codes.ndim != 3:
        return None
    flat = Array(flat.root, flat.dtype, flat.offset, flat.size[:1], flat.stride[:1])
    into = out.viewed((ids.numel, columns))
    rows = codes.size[0] * LANES
    return [Instruction("quantized_embedding", (flat, codes, scales, zeros, into), (4,), (bits, rows))]


@rule(torch.ops.accelc.dequantize.default)
def dequantize(
    out: Array, codes: Array, scales: Array, zeros: Array | None, bits: int, rows: int, columns: int, dtype: Any
) -> Sequence[Instruction] | None:
    if codes.ndim != 3 or not floats(out, scales, zeros):
        return None
    return [Instruction("dequantize", (codes, scales, zeros, out), (3,), (bits,))]


def dequantized_pieces(ins: Instruction) -> list[Instruction | Gemm]:
    """A product with codes as torch's product with floats, some rows of the weight at a time."""
    x, codes, scales, zeros, bias, out, _ = ins.arrays
    assert x is not None
    assert codes is not None
    assert out is not None
    columns, rows = x.size[1], out.size[1]
    blocks = max(1, PIECE // (columns * x.dtype.itemsize * LANES))
    steps: list[Instruction | Gemm] = []
    for first in range(0, codes.size[0], blocks):
        count = min(blocks, codes.size[0] - first)
        begin, used = first * LANES, min(count * LANES, rows - first * LANES)
        parts = [None if a is None else a.narrow(0, first, count) for a in (codes, scales, zeros)]
        weight = Array(next(_TEMPORARY), x.dtype, 0, (used, columns), contiguous((used, columns)))
        steps.append(Instruction("dequantize", (*parts, weight), (3,), ins.ints[:1]))
        own = None if bias is None else bias.narrow(0, begin, used)
        steps.append(Gemm(x, weight, own, out.narrow(1, begin, used)))
    return steps


def with_activations(ins: Instruction, bits: int) -> Instruction:
    """`ins` with activations of so many bits, 16 or 8, if it multiplies them by codes."""
    return replace(ins, ints=(*ins.ints[:2], bits)) if ins.op == "quantized_linear" else ins
