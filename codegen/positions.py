"""Rules for positions, masks and look-ups: integers and conditions beside the values of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from accelc.codegen.arrays import BY_ITEMSIZE, FLOATS, MAX_DIMS, Array, merge_together
from accelc.codegen.instructions import Instruction, mapped, rule

aten, ops = torch.ops.aten, torch.ops.accelc


def _compared(op: str):
    return lambda out, a, b: mapped(out, a, op, b)


for name in ("lt", "le", "gt", "ge", "eq", "ne"):
    rule(getattr(aten, name).Tensor, getattr(aten, name).Scalar)(_compared(name))
rule(aten.logical_not.default)(lambda out, a: mapped(out, a, "eq", 0))


def _logical(op: str, whole: bool):
    """Bits of integers, or truth: then both operands must be bool already."""

    def rule_of(out: Array, a: Any, b: Any):
        truth = all(not isinstance(x, Array) or x.dtype == torch.bool for x in (a, b))
        bits = all(not isinstance(x, Array) or x.dtype in (torch.bool, torch.int64) for x in (a, b))
        return mapped(out, a, op, b) if truth or (bits and whole) else None

    return rule_of


for name in ("and", "or", "xor"):
    bitwise = getattr(aten, f"bitwise_{name}")
    operator_form = getattr(aten, f"__{name}__")
    rule(bitwise.Tensor, bitwise.Scalar, operator_form.Tensor, operator_form.Scalar)(_logical(name, True))
    rule(getattr(aten, f"logical_{name}").default)(_logical(name, False))


@rule(aten.bitwise_not.default)
def bitwise_not(out: Array, a: Array):
    return mapped(out, a, "eq", 0) if a.dtype == torch.bool else mapped(out, a, "xor", -1)


@rule(aten.floor_divide.default)
def floor_divide(out: Array, a: Any, b: Any):
    return mapped(out, a, "floor_divide", b) if b != 0 and not isinstance(b, Array) else None


@rule(aten.remainder.Scalar)
def remainder(out: Array, a: Array, b: float):
    return mapped(out, a, "remainder", b) if b != 0 else None


@rule(aten.clamp.default)
def clamp(out: Array, a: Array, low: float | None = None, high: float | None = None):
    most = 2**62 if a.dtype == torch.int64 else float("inf")
    return mapped(out, a, "clamp", -most if low is None else low, most if high is None else high)


@rule(aten.clamp_min.default)
def clamp_min(out: Array, a: Array, low: float):
    return clamp(out, a, low)


@rule(aten.clamp_max.default)
def clamp_max(out: Array, a: Array, high: float):
    return clamp(out, a, None, high)


@rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(out: Array, condition: Array, a: Any, b: Any):
    return mapped(out, condition, "where", a, b)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(out: Array, a: Array, mask: Array, value: Any):
    return mapped(out, mask, "where", value, a)


# -- look-ups ----------------------------------------------------------------------------------------------------------


@rule(aten.index.Tensor)
def index(out: Array, table: Array, indices: Sequence[Array | None]):
    """Neighbouring dims looked up together; their dims stand in the result where the first one stood."""
    given = [d for d, i in enumerate(indices) if i is not None]
    found = [i for i in indices if i is not None]
    if given != list(range(given[0], given[0] + len(given))) or any(i.dtype != torch.int64 for i in found):
        return None
    first, behind = given[0], given[-1] + 1
    shape = out.size[first : out.ndim - (table.ndim - behind)]
    rest = (0,) * (table.ndim - behind)
    base = Array(
        table.root, table.dtype, table.offset, out.size,
        (*table.stride[:first], *(0,) * len(shape), *table.stride[behind:]),
    )  # fmt: skip
    spread = []
    for i in found:
        i = i.expand(shape)
        spread.append(Array(i.root, i.dtype, i.offset, out.size, ((0,) * first) + i.stride + rest))
    return _look_up(out, base, spread, [(table.size[d], table.stride[d]) for d in given])


@rule(aten.gather.default)
def gather(out: Array, table: Array, dim: int, indices: Array, sparse_grad: bool = False):
    if indices.dtype != torch.int64 or out.ndim == 0:
        return None
    dim %= out.ndim
    stride = tuple(0 if d == dim else s for d, s in enumerate(table.stride))
    base = Array(table.root, table.dtype, table.offset, out.size, stride)
    return _look_up(out, base, [indices], [(table.size[dim], table.stride[dim])])


@rule(aten.index_select.default)
def index_select(out: Array, table: Array, dim: int, indices: Array):
    return index(out, table, [None] * (dim % table.ndim) + [indices]) if table.ndim else None


def _look_up(out: Array, base: Array, indices: Sequence[Array], steps: Sequence[tuple[int, int]]):
    """`base` and `indices` have out's shape; `steps`: size of each indexed dim, and elements between its entries."""
    arrays = merge_together((base, out, *indices))
    merged = arrays[1]
    if merged is None or merged.ndim > MAX_DIMS or out.dtype.itemsize not in BY_ITEMSIZE:
        return None
    return [Instruction("index", (*arrays,), (1,), tuple(x for pair in steps for x in pair), raw=True)]


@rule(ops.top_k.default)
def top_k(out: Array, scores: Array, k: int):
    covered = scores.dtype in FLOATS and scores.ndim <= MAX_DIMS and scores.unit and out.unit
    return [Instruction("top_k", (scores, out), (1,))] if covered else None


@rule(ops.draw_token.default)
def draw_token(
    out: Array, scores: Array, greedy: Array, temperature: Array, k: Array, p: Array, min_p: Array, uniform: Array
):
    settings = (greedy, temperature, k, p, min_p, uniform)
    dtypes = (torch.bool, torch.float32, torch.int64, torch.float32, torch.float32, torch.float64)
    if scores.dtype not in FLOATS or scores.ndim > MAX_DIMS or not scores.unit:
        return None
    if any(array.dtype != dtype for array, dtype in zip(settings, dtypes, strict=True)):
        return None
    given = [array.expand(out.size) for array in settings[:-1]]
    bits = replace(uniform.expand(out.size), dtype=torch.int64)  # of its doubles
    return [Instruction("draw", (scores, *given, bits, out), (7,))]


# -- what a token may see ----------------------------------------------------------------------------------------------


@rule(ops.key_positions.default)
def key_positions(out: Array, positions: Array, lengths: Array, slots: int):
    return [Instruction("key_positions", (positions, lengths, out), (2,))]


@rule(ops.visible.default)
def visible(out: Array, positions: Array, lengths: Array, tree: Array | None, slots: int):
    return [Instruction("visible", (lengths, tree, out), (2,))]
