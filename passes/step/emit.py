"""Writing the step: calls become nodes, sizes become arithmetic on the step's own symbols, look-ups line up with the
batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir.errors import DeriveError
from accelc.ir.program import fetch, store
from accelc.passes.step.analysis import Analysis
from accelc.passes.step.sizes import Size
from accelc.passes.step.wants import Call, Dim, Input, K, Masked, Q, Want

aten = torch.ops.aten
accelc = torch.ops.accelc


@dataclass(frozen=True)
class Value:
    """An emitted node. ``lifted``: it has the batch in front, which the forward value lacks (a per-row look-up)."""

    node: fx.Node
    lifted: bool = False
    zero_hidden: bool = False


class Builder:
    """Appends nodes to the step's graph."""

    def __init__(self, max_length: int, inputs: Sequence[str], states: list[tuple[str, int]]) -> None:
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.max_length = max_length
        self.inputs = {n: self.graph.placeholder(n) for n in (*inputs, "positions", "lengths")}
        self._new = self.inputs[inputs[0]]  # [B, N, ...]
        self.states = {name: self.graph.placeholder(name) for name, _ in states}
        self._first_state = states[0] if states else None
        self._memo: dict[Any, fx.Node] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call."""
        return self.graph.call_function(target, args, kwargs)

    def once(self, key: Any, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call unless `key` was emitted before."""
        if key not in self._memo:
            self._memo[key] = self.call(target, *args, **kwargs)
        return self._memo[key]

    def attribute(self, path: str, tensor: Tensor) -> fx.Node:
        """A parameter, buffer or table of the step."""
        if path not in self._memo:
            store(self.root, path, tensor)
            self._memo[path] = self.graph.get_attr(path)
        return self._memo[path]

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        """A table under a name of its own."""
        return self.attribute(f"accelc_tables.{name}", tensor)

    def slots(self) -> fx.Node:
        """The capacity S of the caches."""
        if self._first_state is None:
            raise DeriveError("a value is wanted for past tokens but nothing is cached")
        name, dim = self._first_state
        return self.once("S", aten.sym_size.int, self.states[name], dim)

    def positions(self, role: str | None) -> fx.Node:
        """Positions of the new tokens [B, N] or of the slots [B, S]; beyond the longest sequence the last one is
        repeated.
        """
        new = self.once("Q", aten.clamp.default, self.inputs["positions"], 0, self.max_length - 1)
        if role == Q:
            return new
        keys = self.once("K0", accelc.key_positions.default, new, self.inputs["lengths"], self.slots())
        return self.once("K", aten.clamp.default, keys, 0, self.max_length - 1)

    def row_and_column(self, roles: tuple[str | None, ...]) -> tuple[fx.Node, fx.Node]:
        """Positions of the last two dims in `roles`, as a column [B, ., 1] and a row [B, 1, .] that broadcast to a
        matrix.
        """
        row = self.call(aten.unsqueeze.default, self.positions(roles[-2]), -1)
        return row, self.call(aten.unsqueeze.default, self.positions(roles[-1]), -2)

    def visible(self) -> fx.Node:
        """Hidden (query, slot) pairs [B, N, S]: the complement of structural visibility."""
        seen = self.once(
            "visible", accelc.visible.default, self.inputs["positions"], self.inputs["lengths"], None,
            self.slots(),
        )  # fmt: skip
        return self.once("hidden", aten.logical_not.default, seen)

    def size(self, size: Size, role: str | None) -> int | fx.Node:
        """A size in the step's symbols."""
        batch = self.once("B", aten.sym_size.int, self._new, 0) if size.batch or size.rows else 0
        time: Any = 0
        if size.has_time:
            time = self.slots() if role == K else self.once("N", aten.sym_size.int, self._new, 1)
        total: Any = size.const
        terms = [(size.batch, batch), (size.time, time)]
        if size.rows:
            terms.append((size.rows, self.once(("rows", role), operator.mul, batch, time)))
        for factor, value in terms:
            if factor:
                scaled = value if factor == 1 else self.once((factor, value), operator.mul, factor, value)
                total = (
                    scaled
                    if isinstance(total, int) and total == 0
                    else self.once((total, scaled), operator.add, total, scaled)
                )
        return total


def emit(build: Builder, analysis: Analysis, want: Want, call: Call, values: dict[Want, Value]) -> Value:
    """Append the nodes that compute `want` and return its value."""
    if call.target == "get_attr":
        path = str(want.node.target)
        return Value(build.attribute(path, fetch(analysis.program.module, path)))
    if call.target == "constant":
        return Value(build.constant(f"constant_{want.node.name}", call.args[0]))
    if call.target == "same":
        return values[call.args[0]]
    if call.target in ("look_up", "triangle"):
        arguments = [values[w].node for w in call.wants()]
        return Value(call.emit(build, call, arguments, False), lifted=call.kwargs["lifted"])  # type: ignore[misc]

    batch = analysis.batch_dim(want.node)
    used = [_argument(build, analysis, a, values) for a in _tensor_arguments(call)]
    lifted = any(v.lifted for v in used)
    replace = {}
    for argument, value in zip(_tensor_arguments(call), used, strict=True):
        node = value.node
        if value.lifted and batch is not None:
            if not call.broadcast:
                raise analysis.refuse(want.node, "takes an index value of another rank together with the batch")
            node = _align(build, analysis, argument, value, len(want.roles), batch)
            merged = analysis.sizes(want.node)[batch].batch  # rows of batch and heads: one copy a head
            if merged > 1:
                place = max(0, batch - (len(want.roles) - len(analysis.sizes(_node_of(argument)))))
                node = build.call(aten.repeat_interleave.self_int, node, merged, place)
        elif value.lifted and call.broadcast:
            rank = len(analysis.sizes(_node_of(argument)))
            missing = len(want.roles) - rank
            for _ in range(missing):
                node = build.call(aten.unsqueeze.default, node, 1)
        replace[id(argument)] = node
    result_lifted = lifted and batch is None
    if call.emit is not None:
        node = call.emit(build, call, [replace[id(a)] for a in _tensor_arguments(call)], result_lifted)
    else:
        args = _convert(build, call.args, replace)
        if result_lifted and call.prefix_sizes is not None:
            front = build.size(Size(batch=1), None) if call.target is not aten.repeat.default else 1
            args = tuple([front, *a] if i == call.prefix_sizes else a for i, a in enumerate(args))
        node = build.call(call.target, *args, **_convert(build, call.kwargs, replace))
    _copy_origin(want.node, node)
    zero = call.zero_hidden and (any(v.zero_hidden for v in used) or _is_masked_softmax(call))
    return Value(node, result_lifted, zero)


def _is_masked_softmax(call: Call) -> bool:
    return any(isinstance(a, Masked) for a in call.args)


def _tensor_arguments(call: Call) -> list[Want | Masked]:
    """Wants and masked wants in order, each occurrence its own object."""
    found: list[Want | Masked] = []

    def visit(value: Any) -> None:
        if isinstance(value, Want | Masked):
            found.append(value)
        elif isinstance(value, list | tuple):
            for v in value:
                visit(v)
        elif isinstance(value, dict):
            for v in value.values():
                visit(v)

    visit(call.args)
    visit(call.kwargs)
    return found


def _node_of(argument: Want | Masked) -> fx.Node:
    return argument.want.node if isinstance(argument, Masked) else argument.node


def _argument(build: Builder, analysis: Analysis, argument: Want | Masked, values: dict[Want, Value]) -> Value:
    if isinstance(argument, Want):
        return values[argument]
    value = values[argument.want]
    if argument.fill == 0.0 and value.zero_hidden:
        return value
    return _hide(build, analysis, argument, value)


def _hide(build: Builder, analysis: Analysis, argument: Masked, value: Value) -> Value:
    """Fill what a query may not see, wherever the query, key and batch dims stand."""
    want = argument.want
    sizes = analysis.sizes(want.node)
    rank = len(sizes)
    query, key = want.roles.index(Q), want.roles.index(K)
    batch = analysis.batch_dim(want.node)
    mask = build.visible()  # [B, N, S]
    if key < query:
        mask = build.once("hidden_t", aten.transpose.int, mask, 1, 2)
    if batch is not None and not sizes[batch].is_batch:  # batch merged with heads, the batch outermost
        heads = sizes[batch].batch
        mask = build.call(aten.repeat_interleave.self_int, mask, heads, 0)
    lead = 0 if batch is None else batch
    first, second = min(query, key), max(query, key)
    shape: list[Any] = [1] * (rank if batch is not None else rank + 1)
    shift = 0 if batch is not None else 1
    if batch is not None and lead > first:
        raise analysis.refuse(want.node, "has its batch dim behind the sequence dims of a reduction")
    shape[lead] = build.size(sizes[batch], None) if batch is not None else build.size(Size(batch=1), None)
    shape[first + shift] = build.size(Size(time=1), want.roles[first])
    shape[second + shift] = build.size(Size(time=1), want.roles[second])
    mask = build.call(aten.reshape.default, mask, shape)
    dtype = want.node.meta["val"].dtype
    fill: Any = argument.fill
    if not dtype.is_floating_point:
        fill = bool(fill) if dtype == torch.bool else int(fill)
    filled = build.call(aten.masked_fill.Scalar, value.node, mask, fill)
    return Value(filled, lifted=batch is None)


def _align(build: Builder, analysis: Analysis, argument: Want | Masked, value: Value, rank: int, batch: int) -> fx.Node:
    """Move the batch of a lifted value from the front to dim `batch` of a result of `rank` dims."""
    sizes = analysis.sizes(_node_of(argument))
    own = len(sizes)
    place = batch - (rank - own)
    if place < 0:
        node = value.node
        for _ in range(-place - 1):
            node = build.call(aten.unsqueeze.default, node, 1)
        return node
    if sizes[place] != Size(const=1):
        raise analysis.refuse(_node_of(argument), "has no room for the batch where its consumer has it")
    node = build.once((value.node, "squeeze", place), aten.squeeze.dim, value.node, place + 1)
    if place == 0:
        return node
    order = list(range(1, own))
    order.insert(place, 0)
    return build.once((node, "permute", tuple(order)), aten.permute.default, node, order)


def _convert(build: Builder, value: Any, replace: dict[int, fx.Node]) -> Any:
    if isinstance(value, Want | Masked):
        return replace[id(value)]
    if isinstance(value, Dim):
        return build.size(value.size, value.role)
    if isinstance(value, Input):
        return build.inputs[value.name]
    if isinstance(value, list | tuple):
        return type(value)(_convert(build, v, replace) for v in value)
    if isinstance(value, dict):
        return {k: _convert(build, v, replace) for k, v in value.items()}
    return value


def _copy_origin(source: fx.Node, target: fx.Node) -> None:
    """Keep where a node came from, for errors and reports."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in source.meta:
            target.meta[key] = source.meta[key]
    target.meta["forward"] = source.name
