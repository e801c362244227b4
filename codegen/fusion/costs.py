"""What a part of a step moves and computes, as expressions in rows, new tokens and context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sympy
import torch.fx as fx

from accelc.codegen.fusion.roles import LOOKUPS, Role, by_expert, product_rows
from accelc.codegen.fusion.values import BATCH, CONTEXT, NEW, SLOTS, Values

ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Cost:
    """Bytes read from and written to memory, and floating-point operations; expressions in `BATCH`, `NEW` (tokens of a
    row) and `CONTEXT` (tokens of a row that attention sees, the new ones included).
    """

    weights: sympy.Expr
    states: sympy.Expr
    values: sympy.Expr
    """Everything else: what is handed from region to region, rows of tables, inputs and outputs."""
    flops: sympy.Expr

    @property
    def bytes(self) -> sympy.Expr:
        return self.weights + self.states + self.values

    def at(self, batch: int, new: int, context: int) -> Numbers:
        """The cost of a step of so many rows and new tokens, at a context."""
        sizes = {BATCH: batch, NEW: new, CONTEXT: context, SLOTS: context}
        parts = (self.weights, self.states, self.values, self.flops)
        return Numbers(*(float(sympy.sympify(part).subs(sizes)) for part in parts))


@dataclass(frozen=True)
class Numbers:
    """A `Cost` at given sizes."""

    weights: float
    states: float
    values: float
    flops: float

    @property
    def bytes(self) -> float:
        return self.weights + self.states + self.values


def cost_of(values: Values, nodes: Collection[fx.Node], kept: Collection[fx.Node]) -> Cost:
    """What computing `nodes` in one kernel costs; `kept`: those of them that others read."""
    inside = set(nodes)
    weights: dict[fx.Node, sympy.Expr] = defaultdict(lambda: ZERO)
    states, moved = ZERO, ZERO
    seen: set[tuple[fx.Node, fx.Node]] = set()
    views: dict[fx.Node, sympy.Expr] = defaultdict(lambda: ZERO)
    for node in nodes:
        for root, read in values.reads(node).items():
            if root in values.states:
                if values.work[node] is Role.ATTENTION:
                    states += values.states[root].bytes_per_token() * BATCH * _seen(node)
                continue
            for view in read:
                if root in inside or (root, view) in seen:
                    continue
                seen.add((root, view))
                if root.op == "get_attr" and (rows := _looked_up(values, node, root, view)) is not None:
                    moved += values.nbytes(rows)
                elif root.op == "get_attr":
                    weights[root] += _weight(values, node, root)
                else:
                    views[root] += values.nbytes(view)
        if values.work[node] is Role.WRITE:
            moved += values.nbytes(node.args[1])  # type: ignore[arg-type]
    moved += sum((_least(size, values.nbytes(root)) for root, size in views.items()), ZERO)
    moved += sum((values.nbytes(node) for node in kept if values.work[node] is not Role.WRITE), ZERO)
    flops = sum((_flops(values, node) for node in nodes), ZERO)
    read = sum((_least(size, values.nbytes(root)) for root, size in weights.items()), ZERO)
    return Cost(sympy.sympify(read), sympy.sympify(states), sympy.sympify(moved), sympy.sympify(flops))


def total(costs: Collection[Cost]) -> Cost:
    """All of them together."""
    parts: Mapping[str, sympy.Expr] = {
        name: sum((getattr(cost, name) for cost in costs), ZERO) for name in ("weights", "states", "values", "flops")
    }
    return Cost(**parts)


def _looked_up(values: Values, node: fx.Node, attribute: fx.Node, view: fx.Node) -> fx.Node | None:
    """The look-up by which a node reads rows of a table, itself or one that it inlines; None where it reads all."""
    if view.target in LOOKUPS and view is not attribute:
        return view
    return node if node.target in LOOKUPS and values.root[node.args[0]] is attribute else None  # type: ignore[index]


def _weight(values: Values, node: fx.Node, attribute: fx.Node) -> sympy.Expr:
    """Bytes of a weight that a node reads: of a stack of experts those that are chosen at most, and else all."""
    size = values.nbytes(attribute)
    if by_expert(node) and attribute.meta["val"].dim() >= 3:
        experts = attribute.meta["val"].shape[0]
        return size / experts * _least(values.size(product_rows(node), 0), sympy.Integer(experts))
    return size


def _seen(attention: fx.Node) -> sympy.Expr:
    """Slots of a row that attention reads."""
    mask, window = str(attention.args[9]), int(attention.args[10])  # type: ignore[call-overload]
    if mask == "window":
        return _least(CONTEXT, sympy.Integer(window) + NEW - 1)
    return _least(CONTEXT, sympy.Integer(window)) if mask == "chunk" else CONTEXT


def _flops(values: Values, node: fx.Node) -> sympy.Expr:
    role = values.work[node]
    if role is Role.PRODUCT:
        return 2 * values.elements(node) * values.size(product_rows(node), -1)
    if role is Role.ATTENTION:
        query, value = node.args[0], node.args[2]
        widths = values.size(query, -1) + values.size(value, -1)  # type: ignore[arg-type]
        return 2 * values.size(query, 0) * values.size(query, 1) * NEW * _seen(node) * widths  # type: ignore[arg-type]
    return values.elements(node) if role is not Role.WRITE else ZERO


def _least(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return a if a == b else sympy.Min(a, b)
