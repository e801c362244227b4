"""Matching and rewriting on normalised graphs: reading calls and numbers, looking through casts, emitting nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from accelc.ir.compat import on_fakes
from accelc.ir.program import fetch

aten = torch.ops.aten

CASTS = (
    aten._to_copy,
    aten.to,
    aten.type_as,
    aten.clone,
    aten.contiguous,
    aten.alias,
    aten.detach,
    aten.lift_fresh_copy,
)
FILLED = {aten.full: 1, aten.scalar_tensor: 0}
"""Operations that make a constant tensor, and the position of its value."""
SHAPE_ONLY = frozenset(
    {
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),
        *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided),
    }
)
"""Operations that read the shape of their first argument, never its data."""
KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")


# -- reading ---------------------------------------------------------------------------------------------------------


def is_call(value: Any, *packets: object) -> TypeGuard[fx.Node]:
    """Whether `value` is a node that calls an overload of one of `packets` (aten.mul, not aten.mul.Tensor)."""
    if not isinstance(value, fx.Node) or not isinstance(value.target, torch._ops.OpOverload):
        return False
    return value.target.overloadpacket in packets


def argument(node: fx.Node, name: str) -> Any:
    """The argument of that name in the operator's schema, its default when absent; KeyError when there is none."""
    for position, schema in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if schema.name == name:
            if not schema.kwarg_only and position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, schema.default_value if schema.has_default_value() else None)
    raise KeyError(f"{node.target} has no argument {name!r}")


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor that `node` computes, or None when it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The sizes of a node that computes one tensor."""
    return tuple(node.meta["val"].shape)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, or two sequences of sizes, are provably equal."""
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))  # type: ignore[arg-type]
    return bool(statically_known_true(a == b))


def is_last(node: fx.Node, dim: object) -> bool:
    """Whether `dim` (an int or a list of one) is the last dimension of the tensor that `node` computes."""
    if isinstance(dim, list | tuple):
        return len(dim) == 1 and is_last(node, dim[0])
    return isinstance(dim, int) and dim in (-1, len(shape(node)) - 1)


def number(value: Any) -> float | None:
    """The number that `value` is, or the node computes: a literal, a filled tensor, a constant of one element."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    value = before_casts(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr" and value.graph.owning_module is not None and len(shape(value)) == 0:
        return float(fetch(value.graph.owning_module, str(value.target)))
    if is_call(value, *FILLED) and tensor(value) is not None:
        return number(value.args[FILLED[value.target.overloadpacket]])  # type: ignore[union-attr]
    if is_call(value, aten.zeros, aten.ones):
        return float(value.target.overloadpacket is aten.ones)  # type: ignore[union-attr]
    return None


def before_casts(value: Any) -> Any:
    """What `value` was before conversions between floating-point types, which change it by rounding, or copies."""
    while is_cast(value):
        value = value.args[0]
    return value


def is_cast(value: Any) -> TypeGuard[fx.Node]:
    """Whether the node converts one floating-point tensor to another on the same device, or copies it."""
    if not is_call(value, *CASTS):
        return False
    new, old = tensor(value), tensor(value.args[0])
    if new is None or old is None or new.device != old.device:
        return False
    return new.dtype == old.dtype or (new.is_floating_point() and old.is_floating_point())


def permutation(node: Any) -> list[int] | None:
    """dims such that `node` is its first argument permuted by them, when it is a transpose or a permute."""
    if is_call(node, aten.permute):
        rank = len(shape(node))
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr]
    if is_call(node, aten.transpose):
        dims = list(range(len(shape(node))))
        a, b = int(node.args[1]) % len(dims), int(node.args[2]) % len(dims)  # type: ignore[call-overload]
        dims[a], dims[b] = dims[b], dims[a]
        return dims
    return None


def dependents(source: fx.Node) -> set[fx.Node]:
    """Nodes whose data depends on the data of `source` (not merely on its shape), and `source` itself."""
    found = {source}
    for node in source.graph.nodes:
        if is_call(node, *SHAPE_ONLY) or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


# -- writing ---------------------------------------------------------------------------------------------------------


class Builder:
    """Emits calls with ``meta``: the value is computed under the graph's fake mode, the origin is that of `anchor`.

    Equal calls are emitted once while the first one stands before the place of the second, so that what all layers
    share (a mask, a rotary table) stays shared.
    """

    def __init__(self) -> None:
        self._emitted: dict[object, fx.Node] = {}

    def emit(
        self,
        anchor: fx.Node,
        target: torch._ops.OpOverload,
        *args: object,
        after: fx.Node | None = None,
        **options: object,
    ) -> fx.Node:
        """A call with `args` and the keyword arguments `options`, right after `after` or else before `anchor`."""
        key = (target, _frozen(args), _frozen(sorted(options.items())))
        known = self._emitted.get(key)
        if known is not None and known < anchor:
            return known
        graph = anchor.graph
        with graph.inserting_after(after) if after is not None else graph.inserting_before(anchor):
            node = graph.call_function(target, args, options)  # type: ignore[arg-type]
        origin = after if after is not None else anchor
        node.meta = {key: origin.meta[key] for key in KEPT_META if key in origin.meta}
        fake: Any = next(t for n in node.all_input_nodes if (t := tensor(n)) is not None)
        with on_fakes(fake.fake_mode):
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **options)
        self._emitted[key] = node
        return node

    def permute(self, anchor: fx.Node, node: fx.Node, dims: Sequence[int]) -> fx.Node:
        """`node` permuted by `dims`, composed with the transposes that made it; nothing is emitted when they cancel."""
        order = list(dims)
        while (inner := permutation(node)) is not None:
            order, node = [inner[d] for d in order], node.args[0]  # type: ignore[assignment]
        moved = [i for i, d in enumerate(order) if i != d]
        if not moved:
            return node
        if len(moved) == 2:
            return self.emit(anchor, aten.transpose.int, node, *moved)
        return self.emit(anchor, aten.permute.default, node, order)

    def cast(self, anchor: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` converted to `dtype`; nothing is emitted when it has it."""
        if node.meta["val"].dtype == dtype:
            return node
        return self.emit(anchor, aten.to.dtype, node, dtype)


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_frozen(v) for v in value)
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
