"""Groups the nodes of a step into regions: the merge that saves most bytes first, as long as one is legal."""

from __future__ import annotations

import functools
import heapq
import itertools
import operator
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import networkx as nx
import sympy
import torch
import torch.fx as fx

from accelc.codegen.fusion.costs import Cost, cost_of, total
from accelc.codegen.fusion.regions import KERNELS, Form, Group, Rules
from accelc.codegen.fusion.roles import Role
from accelc.codegen.fusion.values import BATCH, CONTEXT, NEW, SLOTS, Values
from accelc.codegen.schedule import Region
from accelc.ir import Program

NOMINAL = {BATCH: 1, NEW: 1, CONTEXT: 1024, SLOTS: 1024}
"""Sizes at which merges are compared."""


@dataclass(frozen=True, eq=False)
class Fused:
    """One kernel's part of a step."""

    number: int
    kind: str
    """The operations, and how many of each: regions of the same kind in other layers have the same."""
    form: Form
    nodes: tuple[fx.Node, ...]
    """What it computes, in order; views, sizes and look-ups by inputs are not among them."""
    kept: tuple[fx.Node, ...]
    """Those of them that other regions read, or that are outputs."""
    cost: Cost

    @property
    def name(self) -> str:
        """Unlike any other region's of the program."""
        return f"{self.number:03d}_{self.kind}"

    @property
    def kernels(self) -> int:
        """Launches."""
        return KERNELS.get(self.form.value, 1)


class Fusion:
    """The regions of a step program, in an order in which they can run."""

    def __init__(self, values: Values, groups: list[Group]) -> None:
        self.values = values
        self.program = values.program
        readers = {node: set[fx.Node]() for node in values.work}
        for node in values.work:
            for root in values.reads(node):
                if root in readers:
                    readers[root].add(node)
        self.regions: list[Fused] = []
        for number, group in enumerate(_sorted(values, groups)):
            inside = set(group.nodes)
            kept = tuple(n for n in group.nodes if n in values.outputs or readers[n] - inside)
            cost = cost_of(values, group.nodes, kept)
            self.regions.append(Fused(number, _kind(group), group.form, tuple(group.nodes), kept, cost))

    @functools.cached_property
    def cost(self) -> Cost:
        """Of all regions."""
        return total([region.cost for region in self.regions])

    @functools.cached_property
    def floor(self) -> Cost:
        """Of a step that keeps everything but its outputs on the chip."""
        return cost_of(self.values, list(self.values.work), self.values.outputs)

    @property
    def kernels(self) -> int:
        """Launches of a step."""
        return sum(region.kernels for region in self.regions)

    @property
    def unfused(self) -> int:
        """Launches of a step whose operations are a kernel each."""
        return sum(KERNELS.get(role.value, 1) for role in self.values.work.values())

    def part(self, region: Fused) -> Region:
        """A region with what it needs of free nodes, and the values that cross its border: its reference."""
        own, inputs = set(region.nodes), set[fx.Node]()
        inside = set(own)
        stack = [n for node in region.nodes for n in node.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in inside or node in inputs:
                continue
            one_of_several = node.target is operator.getitem and node.args[0] in self.values.work.keys() - own
            if node.op != "call_function" or node in self.values.work or one_of_several:
                inputs.add(node)
            else:
                inside.add(node)
                stack += node.all_input_nodes
        outputs = [
            each
            for node in region.kept
            for each in ([node] if isinstance(node.meta.get("val"), torch.Tensor) else node.users)
            if isinstance(each.meta.get("val"), torch.Tensor)
        ]
        inside.update(outputs)
        nodes = self.program.graph.nodes
        return Region([n for n in nodes if n in inside], [n for n in nodes if n in inputs], outputs)


def partition(program: Program) -> Fusion:
    """The regions of a step program. Deterministic: the same program gives the same regions."""
    values = Values(program)
    return Fusion(values, _Merger(values).groups())


Candidate = tuple[float, tuple[int, int, int], tuple[Group, Group]]


class _Merger:
    def __init__(self, values: Values) -> None:
        self._values, self._rules = values, Rules(values)
        self._group = {node: Group.of(node, role) for node, role in values.work.items()}
        self._after: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node, before in values.before.items():
            for earlier in before:
                self._after[earlier].add(node)
        self._count = itertools.count()

    def groups(self) -> list[Group]:
        """The groups that are left when nothing can be merged, in no particular order."""
        self._merge_products()
        candidates: list[Candidate] = []
        for group in self._alive():
            for pair in self._pairs(group):
                if pair[0] is group:
                    heapq.heappush(candidates, self._candidate(*pair))
        while candidates:
            first, second = heapq.heappop(candidates)[-1]
            if self._group[first.nodes[0]] is not first or self._group[second.nodes[0]] is not second:
                continue  # one of them is part of another by now, which has candidates of its own
            made = self._rules.joined(first, second)
            if made is None or self._path(first, second, direct=False):
                continue
            self._replace(first, second, made)
            for pair in self._pairs(made):
                heapq.heappush(candidates, self._candidate(*pair))
        self._merge_products()
        return self._alive()

    def _alive(self) -> list[Group]:
        return list(dict.fromkeys(self._group.values()))

    def _merge_products(self) -> None:
        """Products of the same rows share a region."""
        by_rows: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, role in self._values.work.items():
            if role is Role.PRODUCT:
                by_rows[self._values.rows(node)].append(node)
        for products in by_rows.values():
            for one in products:
                for other in products:
                    first, second = self._group[one], self._group[other]
                    if first is second or self._path(first, second) or self._path(second, first):
                        continue
                    if (made := self._rules.beside(first, second)) is not None:
                        self._replace(first, second, made)

    def _candidate(self, first: Group, second: Group) -> Candidate:
        """A merge, in the order in which merges are tried: what saves most bytes first, then what comes first."""
        places = self._values.place[first.nodes[0]], self._values.place[second.nodes[0]], next(self._count)
        return -self._saved(first, second), places, (first, second)

    def _pairs(self, group: Group) -> Iterator[tuple[Group, Group]]:
        """Pairs with a group, of which the second reads what the first makes."""
        before = {self._group[earlier] for node in group.nodes for earlier in self._values.before[node]}
        after = {self._group[later] for node in group.nodes for later in self._after[node]}
        yield from ((other, group) for other in before - {group})
        yield from ((group, other) for other in after - {group})

    def _saved(self, first: Group, second: Group) -> float:
        """Bytes that are not moved when a reader of `first` is in its kernel."""
        inside = {*first.nodes, *second.nodes}
        saved = 0.0
        for node in first.nodes:
            if self._values.work[node] is Role.WRITE or not self._after[node] & set(second.nodes):
                continue
            size = self._bytes(node)
            saved += size if node in self._values.outputs or self._after[node] - inside else 2 * size
        return saved

    @functools.cache  # noqa: B019 - as long as the merging
    def _bytes(self, node: fx.Node) -> float:
        return float(sympy.sympify(self._values.nbytes(node)).subs(NOMINAL))

    def _path(self, first: Group, second: Group, *, direct: bool = True) -> bool:
        """Whether `second` waits for `first`; with `direct` False only through others."""
        last = self._values.place[second.nodes[-1]]
        stack = [node for start in first.nodes for node in self._after[start]]
        goal, begin, seen = set(second.nodes), set(first.nodes), set[int]()
        if direct and goal.intersection(stack):
            return True
        queue = [self._group[node] for node in stack if node not in goal and node not in begin]
        while queue:
            group = queue.pop()
            if id(group) in seen or self._values.place[group.nodes[0]] > last:
                continue
            seen.add(id(group))
            for node in group.nodes:
                for later in self._after[node]:
                    if later in goal:
                        return True
                    if later not in begin and self._group[later] is not group:
                        queue.append(self._group[later])
        return False

    def _replace(self, first: Group, second: Group, made: Group) -> None:
        for node in (*first.nodes, *second.nodes):
            self._group[node] = made


def _sorted(values: Values, groups: Collection[Group]) -> list[Group]:
    """Groups in an order in which each comes after what it waits for, as early as the program has them."""
    owner = {node: group for group in groups for node in group.nodes}
    waiting = nx.DiGraph()
    waiting.add_nodes_from(groups)
    waiting.add_edges_from(
        (owner[earlier], owner[node])
        for node, before in values.before.items()
        for earlier in before
        if owner[earlier] is not owner[node]
    )
    return list(nx.lexicographical_topological_sort(waiting, key=lambda group: values.place[group.nodes[0]]))


def _kind(group: Group) -> str:
    parts: dict[str, int] = defaultdict(int)
    for node in group.nodes:
        parts[str(getattr(node.target, "__name__", node.target)).split(".")[0]] += 1
    return "_".join(name if count == 1 else f"{name}{count}" for name, count in parts.items())
