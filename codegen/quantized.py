"""Rules for products with, and look-ups in, weights in few bits (accelc.ir.quantized)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from accelc.codegen.arrays import FLOATS, Array
from accelc.codegen.instructions import Instruction, floats, rule, scratch
from accelc.ir.quantized import LANES

SEGMENT = 128
"""Columns that share a step of the activations' fixed point, where groups of weights are longer."""


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


def with_activations(ins: Instruction, bits: int) -> Instruction:
    """`ins` with activations of so many bits, 16 or 8, if it multiplies them by codes."""
    return replace(ins, ints=(*ins.ints[:2], bits)) if ins.op == "quantized_linear" else ins
