"""Role rules: for a value wanted in some roles, which inputs are wanted in which roles, and the call that computes it.

Only operations known to keep tokens apart, or known to mix them by contraction and reduction, have a rule; everything
else is refused by name. This file has the registry and the operations that work element by element; `reshaping` has
those that move elements and `mixing` those that mix tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from accelc.passes.step.analysis import REFUSED, Analysis, is_size
from accelc.passes.step.wants import Call, Dim, Roles, Want

aten = torch.ops.aten
Rule = Callable[[Analysis, fx.Node, Roles], Call]
RULES: dict[Any, Rule] = {}


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a role rule for all overloads of the given operations."""

    def register(function: Rule) -> Rule:
        for packet in packets:
            RULES[packet] = function
        return function

    return register


def call_for(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """The call that computes `node` in `roles`. Raises DeriveError for operations without a rule."""
    if node.op == "get_attr":
        return Call("get_attr", (node.target,))
    if node.target is operator.getitem:
        return _getitem(analysis, node, roles)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in RULES:
        return RULES[packet](analysis, node, roles)
    if packet in REFUSED:
        raise analysis.refuse(node, REFUSED[packet])
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise(analysis, node, roles)
    by_name = RULES.get(node.target.name().split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else None)
    if by_name is not None:
        return by_name(analysis, node, roles)
    raise analysis.refuse(node, "is not known to keep tokens apart")


def static_call(analysis: Analysis, node: fx.Node) -> Call:
    """A value of parameters and constants alone is computed in the step as it was in the forward, whatever computes
    it.
    """
    if node.op == "get_attr":
        return Call("get_attr", (node.target,))

    def convert(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Want(value, (None,) * len(analysis.sizes(value)))
        if isinstance(value, list | tuple):
            return type(value)(convert(v) for v in value)
        return value

    return Call(node.target, tuple(map(convert, node.args)), {k: convert(v) for k, v in node.kwargs.items()})


def aligned(analysis: Analysis, argument: fx.Node, roles: Roles) -> Want:
    """`argument` as it lines up, from the right, with a result in `roles`; dims of size one broadcast and have no
    role.
    """
    sizes = analysis.sizes(argument)
    tail = roles[len(roles) - len(sizes) :]
    return Want(argument, tuple(r if s.has_time else None for s, r in zip(sizes, tail, strict=True)))


def scalars(analysis: Analysis, node: fx.Node, value: Any) -> Any:
    """Numbers among the arguments, where a size that follows the sequence must not become a value."""
    if isinstance(value, fx.Node):
        if not is_size(value):
            raise analysis.refuse(node, f"takes the tensor {value.name} where a number was expected")
        symbols, number = analysis.symbols, value.meta["val"]
        known = {symbols.batch, symbols.length}
        free = number.node.expr.free_symbols if hasattr(number, "node") else set()
        if free - known:
            raise analysis.refuse(
                node,
                f"takes the number {value.name}, which is read from a tensor when the model runs",
                remedy="Compute with the tensor itself: leave out .item().",
            )
        size = symbols.size(number) if isinstance(number, torch.SymInt) else None
        if size is None or size.has_time:
            raise analysis.refuse(node, f"uses the sequence length as a number (through {value.name})")
        return Dim(size, None)
    if isinstance(value, list | tuple):
        return type(value)(scalars(analysis, node, v) for v in value)
    return value


def rebuilt(analysis: Analysis, node: fx.Node, tensors: dict[int, Any], **options: Any) -> Call:
    """The same operation with the tensor arguments at the given positions replaced; the rest must be numbers."""
    args = tuple(tensors[i] if i in tensors else scalars(analysis, node, a) for i, a in enumerate(node.args))
    kwargs = {k: scalars(analysis, node, v) for k, v in node.kwargs.items()}
    return Call(node.target, args, kwargs, **options)


def negative(dim: int, rank: int) -> int:
    """A dim counted from the end, which stays right when a value gains a batch dim in front."""
    return dim if dim < 0 else dim - rank


# -- element by element ----------------------------------------------------------------------------------------------


UNTAGGED = """
    to _to_copy __and__ __or__ __xor__ __lshift__ __rshift__ clone contiguous where dropout copy floor_divide
    masked_fill alias detach lift_fresh_copy isin float_power type_as multiply divide true_divide subtract
    absolute negative clip square rsub greater greater_equal less less_equal not_equal relu6 selu celu hardtanh
    fix isfinite log_sigmoid softsign tanhshrink hardswish hardsigmoid isreal nan_to_num lerp addcmul addcdiv
    prelu rrelu logical_xor fill
"""
"""Pointwise operations, most of them other names of tagged ones, that torch does not tag; not every version has all."""


@rule(*(getattr(aten, name) for name in UNTAGGED.split() if hasattr(aten, name)))
@rule(torch.ops.accelc.gated_activation)
def pointwise(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """Each element from the elements that broadcast to it."""

    def convert(value: Any) -> Any:
        if isinstance(value, fx.Node) and not is_size(value):
            return aligned(analysis, value, roles)
        return scalars(analysis, node, value)

    return Call(
        node.target, tuple(map(convert, node.args)), {k: convert(v) for k, v in node.kwargs.items()}, broadcast=True,
        zero_hidden=node.target.overloadpacket in _KEEP_ZERO,
    )  # fmt: skip


_KEEP_ZERO = {aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.dropout, aten.alias, aten.detach, aten.mul}


@rule(torch.ops.accelc.rotary)
def _rotary(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    if analysis.sizes(node)[-1].has_time:
        raise analysis.refuse(node, "rotates along the sequence")
    return pointwise(analysis, node, roles)


def _getitem(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    return Call(operator.getitem, (Want(node.args[0], roles), node.args[1]))
