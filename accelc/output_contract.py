"""What a caller can see of a graph's outputs beyond their values, kept whatever passes did: aliasing and strides.

A pass may drop a clone whose result "is" its input, merge two equal calls, or turn a view into a reshape. Values stay
the same, but ``y = model(x); x.zero_()`` must not change y, two outputs must not share memory, and a result that was
contiguous is viewed by code outside the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from accelc.ir.errors import InvariantError, describe

FORMATS = {torch.contiguous_format: range(64), torch.channels_last: (4,), torch.channels_last_3d: (5,)}


class LayoutError(InvariantError):
    """The strides of an output changed, and no copy can restore them."""


def keep_outputs(
    before: Sequence[object],
    after: Sequence[object],
    written_before: Sequence[fx.Node],
    written_after: Sequence[fx.Node],
) -> list[object]:
    """The outputs `after`, copied where they share memory or have strides as their counterparts in `before` do not.

    `before` and `after` are the outputs of the graph as it came and as it is now, in the same order (nodes, or numbers
    and None), `written_*` the values written to inputs. Raises `LayoutError` for a layout that cannot be restored.
    """
    shared = _sharing(before, written_before)
    kept = list(after)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if not isinstance(new, fx.Node) or not isinstance(old, fx.Node):
            continue
        if not isinstance(value := old.meta.get("val"), torch.Tensor):
            continue
        copied = _sharing(kept, written_after)[i] - shared[i]
        if copied or not same_strides(value, new.meta["val"]):
            kept[i] = _copy_like(new, value)
    return kept


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may be a view of, itself when it is none."""
    while (base := _viewed(node)) is not None:
        node = base
    return node


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the strides are provably equal where they matter (not along dimensions of size one)."""
    return all(
        statically_known_true(x == y) or statically_known_true(size == 1)
        for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def _sharing(outputs: Sequence[object], written: Sequence[fx.Node]) -> list[set[object]]:
    """For each output what it shares memory with: names of inputs, places of earlier outputs and of written values."""
    roots = [storage_root(o) if isinstance(o, fx.Node) else None for o in outputs]
    written_roots = [storage_root(w) for w in written]
    found: list[set[object]] = []
    for i, root in enumerate(roots):
        shared: set[object] = set()
        if root is not None:
            shared |= {("output", j) for j in range(i) if roots[j] is root}
            shared |= {("write", j) for j, other in enumerate(written_roots) if other is root}
            if root.op in ("placeholder", "get_attr"):
                shared.add((root.op, root.target))
        found.append(shared)
    return found


def _viewed(node: fx.Node) -> fx.Node | None:
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and _viewed(source) is not None else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for argument, value in zip(node.target._schema.arguments, node.args):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def _copy_like(node: fx.Node, value: torch.Tensor) -> fx.Node:
    """A copy of `node` with the strides of the fake tensor `value`."""
    for memory_format, ranks in FORMATS.items():
        if value.dim() in ranks and value.is_contiguous(memory_format=memory_format):
            return _insert(node, torch.ops.aten.clone.default, value, memory_format=memory_format)
    if not all(isinstance(s, int) for s in value.stride()) or 0 in value.stride():
        raise LayoutError("passes changed the layout of an output, and it is symbolic", where=describe(node))
    # Dense but permuted: copy in the order of the strides, then permute back.
    order = sorted(range(value.dim()), key=lambda d: -value.stride()[d])
    back = [order.index(d) for d in range(value.dim())]
    dense = value.permute(order)
    permuted = _insert(node, torch.ops.aten.permute.default, node.meta["val"].permute(order), order)
    copied = _insert(permuted, torch.ops.aten.clone.default, dense, memory_format=torch.contiguous_format)
    return _insert(copied, torch.ops.aten.permute.default, value, back)


def _insert(
    node: fx.Node, target: torch._ops.OpOverload, value: torch.Tensor, *args: object, **kwargs: object
) -> fx.Node:
    """A call of `target` on `node`, right behind it."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *args), kwargs)
    new.meta["val"] = value
    return new
