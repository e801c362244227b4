"""Rules for matrix products.

A weight is used as it lies: [N, K] (torch's linear) by rows, [K, N] (GPT-2's layers) by sums of rows. Transposing the
latter once would hold it twice until the model is dropped, and a weight that a user changes would no longer be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accelc.codegen.arrays import FLOATS, MAX_DIMS, Array
from accelc.codegen.instructions import Instruction, floats, rule

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(out: Array, x: Array, weight: Array, bias: Array | None = None) -> Sequence[Instruction] | None:
    if weight.ndim != 2 or x.ndim < 1:
        return None
    rows, into = x.matrix(), out.matrix()
    if rows is None or into is None or (bias and not bias.unit):
        return None
    same = len({a.dtype for a in (out, x, weight, bias) if a is not None}) == 1
    if same and floats(out) and rows.unit and weight.unit:
        return [Instruction("linear", (rows, weight, bias, None, into), (4,))]
    return product(into, rows, weight.transposed(), bias)


@rule(aten.mm.default)
def mm(out: Array, x: Array, matrix: Array):
    return linear(out, x, matrix.transposed())


@rule(aten.addmm.default)
def addmm(out: Array, bias: Array, x: Array, matrix: Array, beta: float = 1, alpha: float = 1):
    return linear(out, x, matrix.transposed(), bias) if beta == alpha == 1 and bias.ndim == 1 else None


@rule(aten.bmm.default, aten.matmul.default)
def matmul(out: Array, x: Array, matrix: Array):
    if x.ndim < 2 or matrix.ndim < 2:
        return None
    if matrix.ndim == 2:
        return linear(out, x, matrix.transposed())
    lead = out.size[:-2]
    return product(out, x.expand((*lead, *x.size[-2:])), matrix.expand((*lead, *matrix.size[-2:])))


@rule(aten.baddbmm.default)
def baddbmm(out: Array, bias: Array, x: Array, matrix: Array, beta: float = 1, alpha: float = 1):
    return product(out, x, matrix, bias) if beta == alpha == 1 and bias.ndim == 1 else None


def product(out: Array, x: Array, matrix: Array, bias: Any = None) -> Sequence[Instruction] | None:
    """out [..., M, N] = x [..., M, K] @ matrix [..., K, N] (+ bias [N])."""
    arrays = [a for a in (out, x, matrix, bias) if a is not None]
    one_dtype = len({a.dtype for a in arrays}) == 1 and out.dtype in FLOATS
    straight = matrix.stride[-1] == 1 or matrix.stride[-2] == 1
    if not one_dtype or not straight or not out.unit or any(a.ndim > MAX_DIMS for a in arrays):
        return None
    return [Instruction("product", (x, matrix, bias, out), (3,))]


@rule(aten.softmax.int, aten._softmax.default)
def softmax(out: Array, x: Array, dim: int, dtype: Any = None):
    if not floats(out, x) or x.ndim == 0:
        return None
    return [Instruction("softmax", (x.last(dim), out.last(dim)), (1,))]
