"""Layout of attention operands: from any layout back to [B, H, T, D], as the model had it before its own views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.fx as fx

from accelc.passes.attention_scores import NotAttention, Term
from accelc.passes.match import Builder, argument, aten, is_call, is_cast, permutation, same, shape, tensor

accelc = torch.ops.accelc
Size: TypeAlias = "int | torch.SymInt"


@dataclass(frozen=True)
class Layout:
    """Where one attention stands: new nodes go before `anchor`; B and T are known as sizes and as nodes."""

    builder: Builder
    anchor: fx.Node
    batch: torch.SymInt
    length: torch.SymInt
    batch_node: fx.Node
    length_node: fx.Node
    heads: int = 0

    def emit(self, target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return self.builder.emit(self.anchor, target, *args)

    def reshape(self, node: fx.Node, sizes: tuple[Size, ...]) -> fx.Node:
        """`node` with the given sizes; nothing is emitted when it has them, or was reshaped from a tensor that has."""
        if same(shape(node), sizes):
            return node
        source = node.args[0] if is_call(node, aten.reshape) else None
        if isinstance(source, fx.Node) and same(shape(source), sizes):
            return source
        return self.emit(aten.reshape.default, node, [self._size(size) for size in sizes])

    def _size(self, size: Size) -> Any:
        if isinstance(size, int):
            return size
        if same(size, self.batch):
            return self.batch_node
        return self.length_node if same(size, self.length) else -1

    def is_split(self, leading: tuple[Size, ...]) -> bool:
        """Whether leading dims are (B, ...) with nothing but numbers behind the batch."""
        return bool(leading) and same(leading[0], self.batch) and all(isinstance(d, int) for d in leading[1:])


def count_heads(layout: Layout, query: fx.Node, levels: tuple[fx.Node, ...]) -> int:
    """H, from the first place where batch and heads stand apart; `NotAttention` when they never do.

    Merged dims [B * H] can be ordered either way: what they were merged from, or are split into, tells.
    """
    seen = [query, *levels]
    if is_call(query, aten.reshape):
        seen.append(query.args[0])  # type: ignore[arg-type]
    for node in seen:
        leading = shape(node)[:-2]
        if layout.is_split(leading):
            heads = 1
            for size in leading[1:]:
                heads *= int(size)
            return heads
    if (found := _heads_of_features(layout, query)) is not None:
        return found
    raise NotAttention(f"batch and heads cannot be told apart in {shape(query)}")


def _heads_of_features(layout: Layout, query: fx.Node) -> int | None:
    """H where features were split and merged with the batch in one reshape, [.., B, H * D] to [.., B * H, D]."""
    node = query
    while permutation(node) is not None:
        node = node.args[0]  # type: ignore[assignment]
    if not is_call(node, aten.reshape):
        return None
    (*outer, batch, features), (*same_outer, merged, width) = shape(node.args[0]), shape(node)  # type: ignore[arg-type]
    if not (isinstance(features, int) and isinstance(width, int) and same(outer, same_outer)):
        return None
    heads = features // width
    return heads if same(batch, layout.batch) and same(merged, layout.batch * heads) else None


def query_rows(layout: Layout, node: fx.Node) -> fx.Node:
    """Queries as [B, H, T, D]."""
    want = (layout.batch, layout.heads, layout.length, shape(node)[-1])
    if not _is_full(layout, shape(node)[:-2]):
        raise NotAttention(f"queries {shape(node)} are shared by rows or heads")
    return layout.reshape(node, want)


def key_value_rows(layout: Layout, key: fx.Node, value: fx.Node, rows: bool) -> tuple[fx.Node, fx.Node]:
    """Keys [B, Hk, T, D] and values [B, Hk, T, Dv], Hk the number of different heads where both repeat theirs alike.

    Values are given as [..., T, Dv], keys as [..., T, D] if `rows`, else as [..., D, T].
    """
    repeated = _rows(layout, key, rows), _rows(layout, value, True)
    distinct = tuple(distinct_heads(layout, node, 1) or node for node in repeated)
    for keys, values in (distinct, repeated):
        if same(shape(keys)[1], shape(values)[1]):
            return keys, values
    raise NotAttention(f"keys {shape(key)} and values {shape(value)} have different numbers of heads")


def _rows(layout: Layout, node: fx.Node, rows: bool) -> fx.Node:
    """Keys or values as [B, Hk, T, D], with the repetition of heads that they come with."""
    node = _without_merging(layout, node)
    rank = len(shape(node))
    if not rows:
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        node = layout.builder.permute(layout.anchor, node, swapped)
        node = _without_merging(layout, node)
    leading, (length, dim) = shape(node)[:-2], shape(node)[-2:]
    if not same(length, layout.length):
        raise NotAttention(f"keys or values {shape(node)} do not run over the tokens of the query")
    if len(leading) == 3 and layout.is_split(leading) and same(leading[2], 1):
        return _drop_dim(layout, node, 2)
    if _is_full(layout, leading):
        node = layout.reshape(node, (layout.batch, layout.heads, length, dim))
    elif not (len(leading) == 2 and layout.is_split(leading) and layout.heads % int(leading[1]) == 0):
        raise NotAttention(f"keys or values {shape(node)} do not have {layout.heads} heads")
    return node


def _is_full(layout: Layout, leading: tuple[Size, ...]) -> bool:
    """Whether leading dims hold every head of every row, B first, in however many dims."""
    total: Size = 1
    for size in leading:
        total = total * size
    return same(total, layout.batch * layout.heads) and (len(leading) == 1 or layout.is_split(leading))


def _without_merging(layout: Layout, node: fx.Node) -> fx.Node:
    """What `node` was before its leading dims were merged, if it has it from a tensor that has them apart."""
    source = node.args[0] if is_call(node, aten.reshape) else None
    if not isinstance(source, fx.Node) or len(shape(node)) >= 4 or len(shape(source)) < 3:
        return node
    apart = layout.is_split(shape(source)[:-2]) and same(shape(source)[-2:], shape(node)[-2:])
    return source if apart else node


def distinct_heads(layout: Layout, node: fx.Node, dim: int) -> fx.Node | None:
    """`node` without the repetition of its heads (at `dim`) for grouped queries; None when they are not repeated."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    order = permutation(node)
    if order is not None:
        inner = distinct_heads(layout, source, order[dim])
        return layout.builder.permute(layout.anchor, inner, order) if inner is not None else None
    if is_cast(node):
        inner = distinct_heads(layout, source, dim)
        return layout.builder.cast(layout.anchor, inner, node.meta["val"].dtype) if inner is not None else None
    if is_call(node, accelc.rotary, accelc.rms_norm):
        tables = [n for n in node.args[1:] if tensor(n) is not None]
        if not all(_broadcasts(shape(table), dim - len(shape(node))) for table in tables):  # type: ignore[arg-type]
            return None
        inner = distinct_heads(layout, source, dim)
        return layout.emit(node.target, inner, *node.args[1:]) if inner is not None else None  # type: ignore[arg-type]
    if is_call(node, aten.repeat_interleave) and argument(node, "dim") in (dim, dim - len(shape(node))):
        return source if isinstance(node.args[1], int) else None
    if is_call(node, aten.expand, aten.repeat):
        return _expanded_from(node, dim)
    if not is_call(node, aten.reshape) or len(shape(source)) != len(shape(node)) + 1:
        return None
    before, after = shape(source), shape(node)
    if not same((*before[:dim], *before[dim + 2 :]), (*after[:dim], *after[dim + 1 :])):
        return None
    inner = _expanded_from(source, dim + 1)
    return _drop_dim(layout, inner, dim + 1) if inner is not None else None


def _expanded_from(node: fx.Node, dim: int) -> fx.Node | None:
    """The tensor with one head that `node` repeats along `dim` alone, or None."""
    if not is_call(node, aten.expand, aten.repeat):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = shape(source), shape(node)
    if len(before) != len(after) or not same(before[dim], 1) or not isinstance(after[dim], int):
        return None
    others = [i for i in range(len(after)) if i != dim]
    return source if all(same(before[i], after[i]) for i in others) else None


def _broadcasts(sizes: tuple[Size, ...], dim: int) -> bool:
    """Whether a tensor of these sizes is the same along the dim that is `dim` (negative) from the right."""
    return len(sizes) < -dim or same(sizes[dim], 1)


def _drop_dim(layout: Layout, node: fx.Node, dim: int) -> fx.Node:
    """`node` without a dim of size one."""
    if is_call(node, aten.unsqueeze) and int(node.args[1]) % len(shape(node)) == dim:  # type: ignore[call-overload]
        return node.args[0]  # type: ignore[return-value]
    return layout.emit(aten.squeeze.dim, node, dim)


def bias_of(layout: Layout, term: Term) -> fx.Node:
    """A bias or mask as a tensor broadcastable to [B, H, T, T]: float with its factor, or bool with True = visible."""
    node = _to_heads(layout, term.node, shape(term.level)[:-2])
    if term.hides:
        return layout.emit(aten.bitwise_not.default, node)
    if not term.is_mask and not node.meta["val"].is_floating_point():
        node = layout.builder.cast(layout.anchor, node, torch.float32)
    if term.factor != 1.0 and not term.is_mask:
        return layout.emit(aten.mul.Tensor, node, term.factor)
    return node


def _to_heads(layout: Layout, node: fx.Node, leading: tuple[Size, ...]) -> fx.Node:
    """A term that broadcasts to scores [*leading, T, T], so that it broadcasts to [B, H, T, T]."""
    own, rows = shape(node)[:-2], shape(node)[-2:]
    if len(shape(node)) <= 2 or len(leading) == 2:
        return node
    if len(leading) == 1 and layout.heads == 1:
        return layout.emit(aten.unsqueeze.default, node, 1)
    if len(leading) == 1:
        if same(own[0], 1):
            return node
        if (tiled := _tiled_over_batch(layout, node)) is not None:
            return layout.emit(aten.unsqueeze.default, tiled, 0)
        return layout.reshape(node, (layout.batch, layout.heads, *rows))
    full = (*((1,) * (len(leading) - len(own))), *own)  # [b, Hk, G]
    if all(same(size, 1) for size in full[1:]):
        return layout.reshape(node, (full[0], 1, *rows))
    if all(same(a, b) for a, b in zip(full[1:], leading[1:])):
        return layout.reshape(node, (full[0], layout.heads, *rows))
    raise NotAttention(f"the bias {shape(node)} is given for some of the head dims {leading}")


def _tiled_over_batch(layout: Layout, node: fx.Node) -> fx.Node | None:
    """[H, a, b] when `node` is that, repeated for each row of the batch along dim 0."""
    if not is_call(node, aten.repeat):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if same(shape(source), (layout.heads, *shape(node)[1:])) else None


def combined_bias(layout: Layout, terms: tuple[Term, ...]) -> fx.Node | None:
    """One bias for all terms: masks alone stay bool; beside float terms they become -inf."""
    masks = [bias_of(layout, t) for t in terms if t.is_mask]
    floats = [bias_of(layout, t) for t in terms if not t.is_mask]
    mask, bias = (masks or [None])[0], (floats or [None])[0]
    for other in masks[1:]:
        mask = layout.emit(aten.bitwise_and.Tensor, mask, other)
    for other in floats[1:]:
        bias = layout.emit(aten.add.Tensor, bias, other)
    if bias is None or mask is None:
        return bias if mask is None else mask
    return layout.emit(aten.where.ScalarOther, mask, bias, float("-inf"))


def sink_per_head(layout: Layout, column: fx.Node) -> fx.Node:
    """The vector [H] that a column [B, H, T, 1], or [B, Hk, G, T, 1], repeats."""
    node = column
    while is_call(node, aten.expand, aten.reshape, aten.unsqueeze) or is_cast(node):
        if len(shape(node)) == 1:
            break
        sizes = shape(node)
        is_per_head = all(isinstance(size, int) for size in sizes) and math.prod(sizes) == layout.heads
        if is_call(node, aten.reshape, aten.unsqueeze) and not is_per_head:
            break
        node = node.args[0]  # type: ignore[assignment]
    if not same(shape(node), (layout.heads,)):
        raise NotAttention(f"the column {column} appended to the scores is not one number a head")
    return node
