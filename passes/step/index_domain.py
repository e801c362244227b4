"""The index domain: values that follow from batch and length alone, as tables over positions.

arange, masks, rotary tables, position ids and biases depend on T but not on the tokens. Along one sequence dim such a
value is a table, evaluated once for the longest sequence and looked up at the positions of the new tokens (Query) or
of the slots (Key). Values over two sequence dims are not tabulated: pointwise operations are replayed on their one-
dimensional tables.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir.program import fetch
from accelc.passes.step.analysis import SIZE_ONLY, Analysis, is_size
from accelc.passes.step.rules import aligned, call_for, scalars
from accelc.passes.step.wants import Call, Dim, Roles

aten = torch.ops.aten

MAX_ELEMENTS = 1 << 28
"""Largest intermediate that is evaluated to make a table; beyond, the error names it."""

FILLS = {
    aten.zeros: 0, aten.ones: 1, aten.empty: 0, aten.zeros_like: 0, aten.ones_like: 1, aten.empty_like: 0,
    aten.new_zeros: 0, aten.new_ones: 1, aten.new_empty: 0,
    aten.full: None, aten.full_like: None, aten.new_full: None,
}  # fmt: skip
"""Constructors of a constant tensor, with the constant, or None where it is an argument."""


class Tables:
    """Evaluates index-domain nodes at concrete sizes."""

    def __init__(self, analysis: Analysis, max_length: int) -> None:
        self.analysis = analysis
        self.max_length = max_length
        self._values: dict[tuple[int, int], dict[fx.Node, Any]] = {}
        self.notes: list[str] = []

    def at(self, node: fx.Node, batch: int, length: int) -> Any:
        """The value of an index-domain node for tokens of shape [batch, length]."""
        values = self._values.setdefault((batch, length), {})
        for ancestor in self._missing(node, values):
            values[ancestor] = self._evaluate(ancestor, values, batch, length)
        return values[node]

    def table(self, node: fx.Node) -> Tensor:
        """The value for one row of the longest sequence; noted when a shorter one is not its prefix."""
        value = self.at(node, 1, self.max_length)
        dim = next(d for d, s in enumerate(self.analysis.sizes(node)) if s.time)
        for length in self.lengths():
            if not torch.equal(value.narrow(dim, 0, length), self.at(node, 1, length)):
                self.notes.append(f"{node.name} depends on the total length; taken at {self.max_length}")
                break
        return value

    def lengths(self) -> list[int]:
        """Shorter lengths at which values are compared with those of the longest sequence."""
        spread = {max(2, self.max_length * i // 8) for i in range(1, 8)}
        return sorted(length for length in spread if length < self.max_length)

    def _missing(self, node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
        wanted, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n in wanted or n in known:
                continue
            wanted.add(n)
            if not is_size(n) and n.target not in SIZE_ONLY:
                stack.extend(n.all_input_nodes)
            elif n.target in SIZE_ONLY and not is_size(n):
                stack.extend(a for a in n.all_input_nodes if is_size(a))
        return sorted(wanted, key=self.analysis.position.__getitem__)

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Any], batch: int, length: int) -> Any:
        symbols = {self.analysis.symbols.batch: batch, self.analysis.symbols.length: length}

        def number(n: fx.Node) -> Any:
            value = n.meta["val"]
            return value if not hasattr(value, "node") else value.node.expr.subs(symbols)

        if is_size(node):
            result = number(node)
            return bool(result) if isinstance(node.meta["val"], torch.SymBool) else _plain(result)
        if node.op == "get_attr":
            return fetch(self.analysis.program.module, str(node.target))
        if node.op != "call_function":
            raise self.analysis.refuse(node, "is read by an index computation")
        shape = getattr(node.meta.get("val"), "shape", ())
        count = 1
        for s in shape:
            count *= _plain(s.node.expr.subs(symbols)) if isinstance(s, torch.SymInt) else s
        if count > MAX_ELEMENTS:
            raise self.analysis.refuse(node, f"is an index computation of {count} elements at length {length}")
        if node.target in SIZE_ONLY:  # the source's data does not matter, so it was not evaluated
            sizes = [_plain(s.node.expr.subs(symbols)) if isinstance(s, torch.SymInt) else s for s in shape]
            constant = FILLS[node.target.overloadpacket]
            if constant is None:
                constant = node.args[-1]
            meta = node.meta["val"]
            return torch.full(sizes, constant, dtype=meta.dtype, device=meta.device)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        with torch.no_grad():
            return node.target(*args, **kwargs)


def index_call(analysis: Analysis, tables: Tables, node: fx.Node, roles: Roles) -> Call:
    """The call that computes an index-domain value in `roles`: fill, row numbers, look-up, or a replay on tables."""
    sizes = analysis.sizes(node)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in FILLS:
        return _fill(analysis, node, roles)
    timed = [d for d, s in enumerate(sizes) if s.has_time]
    if packet in (aten.tril, aten.triu) and len(timed) == 2:
        return _triangle(analysis, node, roles)
    if packet is aten.eye:
        return _diagonal(analysis, node, roles)
    if not timed:
        return _without_time(analysis, tables, node, roles)
    if len(timed) == 1 and sizes[timed[0]].is_time:
        if packet is aten.embedding:  # a learned table is looked up, not copied
            _check_rows(analysis, tables, node)
            return call_for(analysis, node, roles)
        return _look_up(analysis, tables, node, roles, timed[0])
    if len(timed) == 1 and sizes[timed[0]].rows:
        return _rows(analysis, tables, node, roles)
    if len(timed) == 2 and _is_stored(analysis, node):
        return _look_up_pair(analysis, tables, node, roles, timed)
    return call_for(analysis, node, roles)


def _fill(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    constant = FILLS[node.target.overloadpacket]
    value = node.meta["val"]
    if constant is None:
        constant = scalars(analysis, node, node.args[-1])
    return Call(
        aten.full.default, (analysis.dims(node, roles), constant), {"dtype": value.dtype, "device": value.device}
    )  # fmt: skip


def _without_time(analysis: Analysis, tables: Tables, node: fx.Node, roles: Roles) -> Call:
    """No dim along the sequence: numbers of the batch are recomputed; a constant that does not vary is stored."""
    if any(s.batch for s in analysis.sizes(node)):
        if node.target.overloadpacket is aten.arange:
            return _arange(analysis, node, roles)
        return call_for(analysis, node, roles)
    long = tables.at(node, 1, tables.max_length)
    for length in tables.lengths():
        short = tables.at(node, 1, length)
        if not (short.shape == long.shape and torch.equal(short, long)):
            raise analysis.refuse(node, "varies with the sequence length")
    return Call("constant", (long,))


def _arange(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """Row numbers of a batch or of merged rows, counted again for the step's sizes: to pick values by, no value."""
    (size,) = analysis.sizes(node)
    if (user := _arithmetic_with(node)) is not None:
        raise analysis.refuse(
            node,
            f"gives {user.name} the number of a row, so that equal rows differ by their place in the batch",
            remedy="Compute logits from a row's own tokens; row numbers may pick values by, and nothing else.",
        )
    value = node.meta["val"]
    return Call(aten.arange.default, (Dim(size, roles[0]),), {"dtype": value.dtype, "device": value.device})


def _arithmetic_with(rows: fx.Node) -> fx.Node | None:
    """The first operation that makes floats of row numbers."""
    stack, seen = [rows], {rows}
    while stack:
        node = stack.pop()
        for user in node.users:
            value = user.meta.get("val")
            if user in seen or not isinstance(value, Tensor) or _picks_by(user, node):
                continue
            if value.is_floating_point():
                return user
            seen.add(user)
            stack.append(user)
    return None


def _picks_by(user: fx.Node, index: fx.Node) -> bool:
    """Whether `user` reads `index` for where to find values, or what to leave out, and not as a value."""
    return bool(user.args) and user.args[0] is not index and getattr(user.target, "overloadpacket", None) in _PICKS


_PICKS = {aten.index, aten.index_put, aten.index_select, aten.gather, aten.scatter, aten.scatter_add, aten.embedding}


def _rows(analysis: Analysis, tables: Tables, node: fx.Node, roles: Roles) -> Call:
    """A dim of merged rows: repeated positions come out of the pieces before the merge, row numbers are counted
    again.
    """
    if node.target.overloadpacket is aten.arange:
        value = tables.at(node, 2, 5)
        if not torch.equal(value, torch.arange(len(value), dtype=value.dtype, device=value.device)):
            raise analysis.refuse(node, "counts rows from another start or in another step")
        return _arange(analysis, node, roles)
    return call_for(analysis, node, roles)


def _look_up(analysis: Analysis, tables: Tables, node: fx.Node, roles: Roles, dim: int) -> Call:
    """A table over positions. The result has the node's own dims, with one of the batch put in front when it has
    none.
    """
    sizes = analysis.sizes(node)
    batch = next((d for d, s in enumerate(sizes) if s.batch), None)
    if batch is not None:
        if not sizes[batch].is_batch:
            return call_for(analysis, node, roles)
        two = tables.at(node, 2, 5)
        if not torch.equal(two.select(batch, 0), two.select(batch, 1)):
            return call_for(analysis, node, roles)
    table = tables.table(node)
    role = roles[dim]
    if batch is not None:
        table = table.squeeze(batch)
        dim -= batch < dim
    table = table.movedim(dim, 0).contiguous()

    def emit(build: Any, call: Call, values: list[Any], lifted: bool) -> fx.Node:
        positions = build.positions(role)  # [B, N] or [B, S]
        if _is_identity(table):
            rows = positions
            if node.meta["val"].dtype != torch.int64:
                rows = build.call(aten._to_copy.default, rows, dtype=node.meta["val"].dtype)
        else:
            rows = build.call(aten.index.Tensor, build.constant(f"table_{node.name}", table), [positions])
        rank = table.dim() + 1
        order = [0, *(d + 2 if d < dim else d + 1 for d in range(rank - 1))]
        order[1 + dim] = 1
        if batch:  # the batch dim goes where the node has it; in front is where it already is
            order.insert(batch + 1, order[0])
            order = order[1:]
        return rows if order == list(range(rank)) else build.call(aten.permute.default, rows, order)

    return Call("look_up", emit=emit, kwargs={"lifted": batch is None})


def _is_identity(table: Tensor) -> bool:
    return table.dim() == 1 and not table.is_floating_point() and torch.equal(table, torch.arange(len(table)).to(table))


def _is_stored(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a two-dimensional index value is cut out of a stored buffer (a `tril` mask) rather than computed."""
    while node.op == "call_function" and node.args and node.target.overloadpacket in _CUTS:
        node = node.args[0]
    return node.op == "get_attr"


_CUTS = {
    aten.slice,
    aten.view,
    aten.reshape,
    aten.unsqueeze,
    aten._to_copy,
    aten.to,
    aten.alias,
    aten.eq,
    aten.logical_not,
}


def _look_up_pair(analysis: Analysis, tables: Tables, node: fx.Node, roles: Roles, timed: list[int]) -> Call:
    """A stored [T, T] buffer, looked up at query and key positions."""
    table = tables.at(node, 1, tables.max_length).movedim(timed, (0, 1)).contiguous()
    first, second = roles[timed[0]], roles[timed[1]]
    rank = table.dim()

    def emit(build: Any, call: Call, values: list[Any], lifted: bool) -> fx.Node:
        row, column = build.row_and_column((first, second))
        value = build.call(aten.index.Tensor, build.constant(f"table_{node.name}", table), [row, column])
        # [B, first, second, rest] back to the node's order, the batch in front
        order = [0] * (rank + 1)
        rest = iter(range(3, rank + 1))
        for d in range(rank):
            order[d + 1] = 1 + timed.index(d) if d in timed else next(rest)
        return value if order == list(range(rank + 1)) else build.call(aten.permute.default, value, order)

    return Call("look_up", emit=emit, kwargs={"lifted": True})


def _diagonal(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """eye over two sequence dims: equal positions."""
    if not all(s.is_time for s in analysis.sizes(node)):
        raise analysis.refuse(node, "is an identity matrix over other dims than the sequence")

    def emit(build: Any, call: Call, values: list[Any], lifted: bool) -> fx.Node:
        row, column = build.row_and_column(roles)
        same = build.call(aten.eq.Tensor, row, column)
        dtype = node.meta["val"].dtype
        return same if dtype == torch.bool else build.call(aten._to_copy.default, same, dtype=dtype)

    return Call("triangle", emit=emit, kwargs={"lifted": True})


def _triangle(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """tril and triu over two sequence dims, the last two, compare positions."""
    diagonal = scalars(analysis, node, node.args[1]) if len(node.args) > 1 else 0
    lower = node.target.overloadpacket is aten.tril
    base = aligned(analysis, node.args[0], roles)

    own_batch = analysis.batch_dim(node)
    if own_batch not in (None, 0) or any(role is None for role in roles[-2:]):
        raise analysis.refuse(node, "takes the triangle of other dims than the sequence's")

    def emit(build: Any, call: Call, values: list[Any], lifted: bool) -> fx.Node:
        row, column = build.row_and_column(roles[-2:])
        difference = build.call(aten.sub.Tensor, column, row)
        compare = aten.le.Scalar if lower else aten.ge.Scalar
        inside = build.call(compare, difference, diagonal)  # [B, ., .]
        for _ in range(len(roles) - 2 - (own_batch == 0)):
            inside = build.call(aten.unsqueeze.default, inside, 1)
        zero = build.call(aten.scalar_tensor.default, 0, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
        return build.call(aten.where.self, inside, values[0], zero)

    return Call("triangle", (base,), emit=emit, kwargs={"lifted": own_batch is None})


def _check_rows(analysis: Analysis, tables: Tables, node: fx.Node) -> None:
    """A learned position table must reach to the last position."""
    rows = analysis.sizes(node.args[0])[0]
    highest = int(tables.at(node.args[1], 1, tables.max_length).max()) if analysis.is_index(node.args[1]) else 0
    if rows.is_const and highest >= rows.const:
        raise analysis.refuse(
            node,
            f"has {rows.const} learned positions; max_length {tables.max_length} reads position {highest}",
            remedy=f"Pass max_length={tables.max_length - (highest - rows.const + 1)} or less.",
        )


def _plain(value: Any) -> Any:
    """A Python number from sympy."""
    if isinstance(value, sympy.Basic):
        return int(value) if value.is_integer else float(value)
    return value
