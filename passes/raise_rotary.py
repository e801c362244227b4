"""Raise rotary: spelled-out rotary position embeddings become `accelc::rotary`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.passes.base import Pass, PassResult
from accelc.passes.match import Builder, argument, aten, is_call, is_last, number, same, shape, tensor
from accelc.passes.registry import register_pass

END = 1 << 62
"""A slice that ends here or later runs to the end."""


@register_pass
@dataclass(frozen=True)
class RaiseRotary(Pass):
    """Rotary embedding of the whole last dim of a tensor becomes one `accelc::rotary`.

    Four spellings are known:

    * x * cos + rotate(x) * sin with full-width tables; rotate is cat((-b, a)) of halves, stack((-b, a)) of neighbours;
    * cat or stack of (a * cos - b * sin, b * cos + a * sin) with half-width tables, which are then widened (once for
      all that share them); a and b the halves, or the even and odd elements;
    * even and odd elements in, halves out (DeepSeek): the elements are put into halves first;
    * a product of complex numbers (Llama 4), the table split into its real and imaginary part.

    Partial rotary matches on the slice that is rotated; the concatenation with what passes through stays. Matches are
    the tensors rotated. Anything else that multiplies by tables of cosines stays as it is.
    """

    name = "raise_rotary"
    after = ("normalise",)
    before = ("derive_step", "raise_attention")
    requires = ("normalised",)
    expected_matches = (0, None)

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        builder = Builder()
        matches = 0
        for node in list(program.graph.nodes):
            new = _from_rotated(builder, node) or _from_parts(builder, node) or _from_complex(builder, node)
            if new is not None:
                node.replace_all_uses_with(builder.cast(node, new, node.meta["val"].dtype))
                matches += 1
        program.graph.eliminate_dead_code()
        program.module.recompile()
        return PassResult(program, matches)


def _rotary(builder: Builder, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool) -> fx.Node:
    return builder.emit(node, torch.ops.accelc.rotary.default, x, cos, sin, interleaved)


# -- parts of the last dim -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The first or second (`index`) half of the last dim of `whole`, or its even or odd elements if `strided`."""

    whole: fx.Node
    index: int
    strided: bool


def _part(node: Any) -> Part | None:
    """What part of the last dim of another tensor `node` is."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and is_call(node.args[0], aten.split, aten.split_with_sizes, aten.chunk):
        split, index = node.args
        whole = split.args[0]  # type: ignore[union-attr]
        parts = split.meta["val"]  # type: ignore[union-attr]
        halves = len(parts) == 2 and is_last(whole, argument(split, "dim")) and same(parts[0].shape, parts[1].shape)
        return Part(whole, index, False) if halves else None  # type: ignore[arg-type]
    if is_call(node, aten.select):
        return _pair_element(node)
    if not is_call(node, aten.slice) or not is_last(node, argument(node, "dim")):
        return None
    whole = node.args[0]
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    width, start = shape(whole)[-1], start or 0  # type: ignore[arg-type]
    if not isinstance(width, int) or width % 2 or not isinstance(start, int):
        return None
    runs_on = end is None or (isinstance(end, int) and end >= min(END, width))
    if step == 2 and start in (0, 1) and runs_on:
        return Part(whole, start, True)  # type: ignore[arg-type]
    if step != 1 or not same(shape(node)[-1], width // 2) or start % width not in (0, width // 2):
        return None
    return Part(whole, int(start != 0), False)  # type: ignore[arg-type]


def _pair_element(node: fx.Node) -> Part | None:
    """x.reshape(..., R / 2, 2)[..., i] is every other element of x, x.reshape(..., 2, R / 2)[..., i, :] a half."""
    pairs, dim, index = node.args
    if not is_call(pairs, aten.reshape) or index not in (0, 1):
        return None
    whole, rank = pairs.args[0], len(shape(pairs))
    back = rank - int(dim) % rank  # type: ignore[call-overload]
    if back not in (1, 2) or shape(pairs)[-back] != 2 or not same(shape(whole)[:-1], shape(pairs)[:-2]):  # type: ignore[arg-type]
        return None
    return Part(whole, index, back == 1)  # type: ignore[arg-type]


def _joined(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(first, second, interleaved) when the last dim of `node` is two tensors, one after the other or interleaved."""
    if is_call(node, aten.cat):
        parts = node.args[0]
        if len(parts) != 2 or not is_last(node, argument(node, "dim")) or not same(shape(parts[0]), shape(parts[1])):  # type: ignore[arg-type,index]
            return None
        return (*parts, False)  # type: ignore[misc]
    stack: Any = node.args[0] if is_call(node, aten.reshape, aten.flatten) else None
    if not is_call(stack, aten.stack) or len(stack.args[0]) != 2:  # type: ignore[arg-type]
        return None
    first, second = stack.args[0]  # type: ignore[misc]
    sizes, width = shape(first), shape(first)[-1]
    if not isinstance(width, int) or not same(shape(node), (*sizes[:-1], 2 * width)):
        return None
    back = len(sizes) + 1 - int(argument(stack, "dim")) % (len(sizes) + 1)  # type: ignore[call-overload]
    return (first, second, back == 1) if back in (1, 2) else None


# -- x * cos + rotate(x) * sin ---------------------------------------------------------------------------------------


def _from_rotated(builder: Builder, node: fx.Node) -> fx.Node | None:
    if not is_call(node, aten.add) or number(argument(node, "alpha")) != 1:
        return None
    for plain, turned in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if not (is_call(plain, aten.mul) and is_call(turned, aten.mul)):
            return None
        for rotated, sin in (turned.args[:2], turned.args[1::-1]):
            found = _rotation_of(rotated)
            if found is None:
                continue
            x, interleaved = found
            for same_x, cos in (plain.args[:2], plain.args[1::-1]):
                if same_x is x and _are_tables(x, cos, sin, full=True):
                    return _rotary(builder, node, x, cos, sin, interleaved)  # type: ignore[arg-type]
    return None


def _rotation_of(node: Any) -> tuple[fx.Node, bool] | None:
    """(x, interleaved) when `node` is (-b, a) for the parts (a, b) of x."""
    joined = _joined(node) if isinstance(node, fx.Node) else None
    if joined is None or not is_call(joined[0], aten.neg):
        return None
    second, first = _part(joined[0].args[0]), _part(joined[1])
    if first is None or second is None or first.whole is not second.whole:
        return None
    if (first.index, second.index) != (0, 1) or not (first.strided == second.strided == joined[2]):
        return None
    return first.whole, joined[2]


def _are_tables(x: fx.Node, cos: Any, sin: Any, *, full: bool) -> bool:
    """Whether cos and sin are tensors that broadcast to x, with its last dim or half of it."""
    width = shape(x)[-1]
    for table in (cos, sin):
        value = tensor(table)
        if value is None or not value.is_floating_point() or not 0 < value.dim() <= len(shape(x)):
            return False
        if not same(value.shape[-1], width if full else width // 2):
            return False
        outer = zip(reversed(value.shape[:-1]), reversed(shape(x)[:-1]))
        if not all(same(a, 1) or same(a, b) for a, b in outer):
            return False
    return True


# -- (a * cos - b * sin, b * cos + a * sin) --------------------------------------------------------------------------


def _from_parts(builder: Builder, node: fx.Node) -> fx.Node | None:
    joined = _joined(node)
    if joined is None:
        return None
    first, second, interleaved = joined
    if not is_call(first, aten.sub) or not is_call(second, aten.add):
        return None
    if number(argument(first, "alpha")) != 1 or number(argument(second, "alpha")) != 1:
        return None
    if not all(is_call(term, aten.mul) for term in (*first.args[:2], *second.args[:2])):
        return None
    a_cos, b_sin = (set(term.args) for term in first.args[:2])  # type: ignore[union-attr]
    for plus in (second.args[:2], second.args[1::-1]):
        b_cos, a_sin = (set(term.args) for term in plus)  # type: ignore[union-attr]
        a, b, cos, sin = a_cos & a_sin, b_cos & b_sin, a_cos & b_cos, a_sin & b_sin
        if not all(len(one) == 1 for one in (a, b, cos, sin)):
            continue
        # The formula is symmetric in what turns and what it is turned by: _widened tells them apart.
        rotated = _widened(builder, node, a.pop(), b.pop(), cos.pop(), sin.pop(), interleaved)
        if rotated is not None:
            return rotated
    return None


def _widened(
    builder: Builder, node: fx.Node, a: fx.Node, b: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool
) -> fx.Node | None:
    """The rotation of the tensor that a and b are parts of, with half-width tables widened."""
    first, second = _part(a), _part(b)
    if first is None or second is None or first.whole is not second.whole or (first.index, second.index) != (0, 1):
        return None
    if first.strided != second.strided or not _are_tables(first.whole, cos, sin, full=False):
        return None
    x = first.whole
    if first.strided != interleaved:
        if interleaved:
            return None  # halves in, neighbours out: not met in any model
        x = builder.emit(node, aten.cat.default, [a, b], -1)
    wide_cos, wide_sin = (_wide(builder, node, table, interleaved) for table in (cos, sin))
    return _rotary(builder, node, x, wide_cos, wide_sin, interleaved)


def _wide(builder: Builder, node: fx.Node, table: fx.Node, interleaved: bool) -> fx.Node:
    """[..., R / 2] -> [..., R]: each element for both of the pair that it turns; placed for all users of the table."""
    if interleaved:
        return builder.emit(node, aten.repeat_interleave.self_int, table, 2, -1, after=table)
    return builder.emit(node, aten.cat.default, [table, table], -1, after=table)


# -- complex products ------------------------------------------------------------------------------------------------


def _from_complex(builder: Builder, node: fx.Node) -> fx.Node | None:
    """reshape(view_as_real(view_as_complex(reshape(x, [..., R / 2, 2])) * table)) with a complex table [..., R / 2]."""
    real: Any = node.args[0] if is_call(node, aten.reshape, aten.flatten) else None
    product: Any = real.args[0] if is_call(real, aten.view_as_real) else None
    if not is_call(product, aten.mul):
        return None
    for number_pairs, table in (product.args[:2], product.args[1::-1]):
        pairs: Any = number_pairs.args[0] if is_call(number_pairs, aten.view_as_complex) else None
        if not is_call(pairs, aten.reshape) or tensor(table) is None or is_call(table, aten.view_as_complex):
            continue
        x = pairs.args[0]
        if not same(shape(x), shape(node)) or not same(shape(x)[:-1], shape(pairs)[:-2]) or shape(pairs)[-1] != 2:  # type: ignore[arg-type]
            continue
        if not table.meta["val"].is_complex() or not same(shape(table)[-1], shape(pairs)[-2]):  # type: ignore[union-attr,arg-type]
            continue
        parts = builder.emit(node, aten.view_as_real.default, table, after=table)  # type: ignore[arg-type]
        tables = []
        for index in (0, 1):
            half = builder.emit(node, aten.select.int, parts, -1, index, after=parts)
            tables.append(_wide(builder, node, half, interleaved=True))
        return _rotary(builder, node, x, tables[0], tables[1], True)  # type: ignore[arg-type]
    return None
