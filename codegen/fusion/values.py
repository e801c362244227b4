"""Where the values of a program come from: what is computed, what is free, and what waits for what."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from accelc.codegen.fusion.roles import LOOKUPS, Role, product_rows, role_of
from accelc.codegen.schedule import tensors_in
from accelc.ir import Program
from accelc.ir.compat import storage_key
from accelc.ir.dialect import UPDATES
from accelc.ir.shapes import propagate
from accelc.ir.state import StateSpec

BATCH, NEW, SLOTS, CONTEXT = (sympy.Symbol(name, integer=True, positive=True) for name in "BNSC")
"""Rows, new tokens of a row, slots of a cache, and those that attention reads: a row's tokens, new ones included."""


class Values:
    """The nodes of a step program, which is copied, by what they cost.

    ``work``: nodes that compute something, with their roles. All others are free: views, sizes, what depends on sizes
    alone, and look-ups by inputs (the rows of an embedding, of rotary tables), which every reader does for itself at
    the cost of reading the result.
    """

    def __init__(self, program: Program) -> None:
        self.program = program.clone()
        propagate(self.program)
        self.symbols = _symbols(self.program)
        self.states: dict[fx.Node, StateSpec] = {
            node: spec
            for node in self.program.placeholders()
            for spec in self.program.states
            if spec.name == str(node.target)
        }
        self.root: dict[fx.Node, fx.Node] = {}
        """Of each tensor: the node that it is a view of, or itself."""
        self.work: dict[fx.Node, Role] = {}
        self._classify()
        self.place = {node: place for place, node in enumerate(self.work)}
        """The order of the program."""
        returned = dict.fromkeys(self.root[n] for n in self.program.graph.output_node().all_input_nodes)
        self.outputs = [node for node in returned if node in self.work]
        self.before: dict[fx.Node, set[fx.Node]] = {}
        """The work that a node of work waits for, by values and by states that are written."""
        self._order()

    # -- what is free --------------------------------------------------------------------------------------------------

    def _classify(self) -> None:
        static: set[fx.Node] = set()
        weights: dict[fx.Node, bool] = {}
        inlined: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            self.root[node] = node
            if node.op != "call_function":
                weights[node] = node.op == "get_attr"
                continue
            if node.target not in UPDATES and not tensors_in(node.meta.get("val")):
                static.add(node)  # a size
                continue
            tensors = [n for n in node.all_input_nodes if tensors_in(n.meta.get("val"))]
            if self._is_view(node, tensors):
                self.root[node] = self.root[tensors[0]]
                weights[node] = weights.get(tensors[0], False)
                if tensors[0] in static:
                    static.add(node)
                continue
            if node.target not in UPDATES and all(n in static for n in tensors):
                static.add(node)
                continue
            role = role_of(node, weights)
            roots = {self.root[n] for n in tensors}
            if role in (Role.LOOKUP, Role.ELEMENTS) and all(
                n.op == "get_attr" or n in inlined or (n.op == "placeholder" and n not in self.states) for n in roots
            ):
                inlined.add(node)
                continue
            self.work[node] = role

    def _is_view(self, node: fx.Node, tensors: list[fx.Node]) -> bool:
        """Whether a node gives other views of the memory of its first argument, and computes nothing."""
        if node.target is operator.getitem:
            return True
        if node.target in UPDATES or not tensors:
            return False
        source = tensors[0].meta["val"]
        if not isinstance(source, Tensor):
            return False
        mine = tensors_in(node.meta["val"])
        return all(storage_key(t) == storage_key(source) and t.dtype == source.dtype for t in mine)

    # -- what waits for what -------------------------------------------------------------------------------------------

    def _order(self) -> None:
        written: dict[fx.Node, fx.Node] = {}
        readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.program.graph.nodes:
            if node not in self.work:
                continue
            roots = set(self.reads(node))
            before = {root for root in roots if root in self.work}
            touched = [root for root in roots if root in self.states]
            before |= {written[state] for state in touched if state in written}
            if node.target in UPDATES:
                state = self.root[node.args[0]]
                before |= set(readers[state])
                written[state] = node
            for state in touched:
                readers[state].append(node)
            self.before[node] = before - {node}

    def reads(self, node: fx.Node) -> dict[fx.Node, list[fx.Node]]:
        """The memory that a node reads, through what is free: values of work, inputs, states and attributes, and how
        each is read: the views.
        """
        found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for argument in node.all_input_nodes:
            for root, view in self._sources(argument):
                found[root].append(view)
        return dict(found)

    def _sources(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        root = self.root[node]
        if root in self.work or root.op != "call_function":
            if tensors_in(root.meta.get("val")):
                yield root, node
            return
        table = root.args[0] if root.target in LOOKUPS else None
        for argument in root.all_input_nodes:  # computed by whoever reads it
            if argument is table:
                yield self.root[argument], root  # rows of the table, as many as are looked up
            else:
                yield from self._sources(argument)

    def rows(self, product: fx.Node) -> fx.Node:
        """The memory with the rows that a product multiplies."""
        return self.root[product_rows(product)]

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def elements(self, node: fx.Node) -> sympy.Expr:
        """Elements of a node's tensors, in `BATCH`, `NEW` and `SLOTS`."""
        return sum((self._elements(t) for t in tensors_in(node.meta["val"])), sympy.Integer(0))

    def nbytes(self, node: fx.Node) -> sympy.Expr:
        """Bytes of a node's tensors."""
        tensors = tensors_in(node.meta["val"])
        return sum((self._elements(t) * t.dtype.itemsize for t in tensors), sympy.Integer(0))

    def size(self, node: fx.Node, dim: int) -> sympy.Expr:
        """One size of a node's tensor."""
        return self._expression(node.meta["val"].shape[dim])

    def _elements(self, tensor: Tensor) -> sympy.Expr:
        return sympy.prod([self._expression(n) for n in tensor.shape])

    def _expression(self, size: Any) -> sympy.Expr:
        if isinstance(size, torch.SymInt):
            return sympy.sympify(size.node.expr).subs(self.symbols)
        return sympy.Integer(size)


def _symbols(program: Program) -> dict[sympy.Expr, sympy.Symbol]:
    """The symbols of fake values as those of this module."""
    named = {"B": BATCH, "N": NEW, "S": SLOTS}
    found: dict[sympy.Expr, sympy.Symbol] = {}
    specs = {spec.name: spec.shape for spec in program.states}
    shapes = {"tokens": ("B", "N"), **specs}
    for node in program.placeholders():
        for letter, size in zip(shapes.get(str(node.target), ()), node.meta["val"].shape):
            if isinstance(letter, str) and isinstance(size, torch.SymInt):
                found[size.node.expr] = named[letter]
    return found
