"""Which operations become instructions, which others run together, and in which order all of it runs.

Levels: a region of other operations and the instructions after it share a level; a value that a region needs from an
instruction puts the region one level higher. All foreign operations of one level form one region, which is convex by
construction.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_arg

from accelc.codegen import positions, products, quantized  # noqa: F401  (register rules)
from accelc.codegen.arrays import Array
from accelc.codegen.errors import MutationError
from accelc.codegen.instructions import RULES, Instruction
from accelc.ir.compat import storage_key
from accelc.ir.dialect import UPDATES
from accelc.ir.errors import around


@dataclass
class Region:
    """Nodes without kernels that run together; `inputs` and `outputs` are the values that cross its border."""

    nodes: list[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


@dataclass
class Schedule:
    """`items` in the order of execution: nodes that have a rule, and regions. `kinds`: what became of each node, as
    `_classify` says.
    """

    items: list[fx.Node | Region]
    kinds: dict[fx.Node, str]

    def regions(self) -> list[Region]:
        return [item for item in self.items if isinstance(item, Region)]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a node's value."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, tuple | list) else []


def lower(
    node: fx.Node, value: Callable[[fx.Node], Any], array: Callable[[torch.Tensor], Array]
) -> list[Instruction] | None:
    """The instructions of a node, or None where no kernel covers it. `value`: fake values; `array`: where one lies."""
    found = RULES.get(node.target)
    if found is None:
        return None

    def concrete(x: Any) -> Any:
        return array(value(x)) if isinstance(value(x), torch.Tensor) else value(x)

    args, kwargs = map_arg(node.args, concrete), map_arg(dict(node.kwargs), concrete)
    out = value(node)
    result = found(array(out) if isinstance(out, torch.Tensor) else None, *args, **kwargs)
    return None if result is None else list(result)


def schedule(graph: fx.Graph, values: Mapping[fx.Node, Any], array: Callable[[torch.Tensor], Array]) -> Schedule:
    """Classify and order the nodes. `values`: of each node, at given sizes; `array`: where a tensor lies."""
    kinds = _classify(graph, values, array)
    levels = _levels(graph, values, kinds)
    foreign: dict[int, Region] = {}
    native: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if kinds[node] == "foreign":
            foreign.setdefault(levels[node], Region([])).nodes.append(node)
        elif kinds[node] == "native":
            native[levels[node]].append(node)
    items: list[fx.Node | Region] = []
    for level in sorted({*foreign, *native}):
        if level in foreign:
            items.append(_border(foreign[level], graph, values, kinds))
        items += native[level]
    return Schedule(items, kinds)


def _classify(
    graph: fx.Graph, values: Mapping[fx.Node, Any], array: Callable[[torch.Tensor], Array]
) -> dict[fx.Node, str]:
    """ "input", "attribute", "size" (no tensor), "constant" (made from sizes alone, computed once a plan), "view" (no
    work), "native" (has instructions) or "foreign" (torch's or Inductor's).
    """
    kinds: dict[fx.Node, str] = {}
    returned = {storage_key(t) for n in graph.output_node().all_input_nodes for t in tensors_in(values[n])}
    static: set[fx.Node] = set()
    for node in graph.nodes:
        value = values.get(node)
        if node.op in ("placeholder", "get_attr", "output"):
            kinds[node] = {"placeholder": "input", "get_attr": "attribute", "output": "output"}[node.op]
            continue
        if node.target is operator.getitem and kinds[node.args[0]] in ("foreign", "constant"):
            kinds[node] = kinds[node.args[0]]
        elif node.target in UPDATES:
            kinds[node] = "native" if lower(node, values.__getitem__, array) is not None else "foreign"
        elif not tensors_in(value):
            kinds[node] = "size"
        elif getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise MutationError(f"{node.target} writes to a tensor.", where="\n" + around(graph, node))
        elif _is_view(node, values):
            kinds[node] = "view"
        elif _is_static(node, values, static) and not returned & {storage_key(t) for t in tensors_in(value)}:
            kinds[node] = "constant"
        else:
            covered = isinstance(value, torch.Tensor) and lower(node, values.__getitem__, array) is not None
            kinds[node] = "native" if covered else "foreign"
        if kinds[node] in ("size", "constant") or (kinds[node] == "view" and _is_static(node, values, static)):
            static.add(node)
    return kinds


def _is_static(node: fx.Node, values: Mapping[fx.Node, Any], static: set[fx.Node]) -> bool:
    """Whether a value depends on sizes alone."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and all(n in static or not tensors_in(values[n]) for n in node.all_input_nodes)


def _is_view(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    sources = {storage_key(t) for n in node.all_input_nodes for t in tensors_in(values[n])}
    mine = tensors_in(values[node])
    same = {t.dtype for n in node.all_input_nodes for t in tensors_in(values[n])} >= {t.dtype for t in mine}
    return same and all(storage_key(t) in sources for t in mine)


def _levels(graph: fx.Graph, values: Mapping[fx.Node, Any], kinds: Mapping[fx.Node, str]) -> dict[fx.Node, int]:
    levels: dict[fx.Node, int] = {}
    producer: dict[fx.Node, str] = {}  # what a view finally comes from
    written: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        before = list(node.all_input_nodes)
        keys = {storage_key(t) for n in node.all_input_nodes for t in tensors_in(values[n])}
        if kinds[node] in ("native", "foreign"):  # in-place writes order what touches the same storage
            before += [written[k] for k in keys if k in written]
            if node.target in UPDATES:
                target = storage_key(values[node.args[0]])
                before += readers[target]
                written[target] = node
            for k in keys:
                readers[k].append(node)
        foreign = kinds[node] == "foreign"
        levels[node] = max((levels[n] + (foreign and producer[n] == "native") for n in before), default=0)
        producer[node] = kinds[node]
        if kinds[node] in ("view", "size"):
            own = [n for n in before if levels[n] == levels[node]]
            producer[node] = "native" if any(producer[n] == "native" for n in own) else "foreign"
    return levels


def _border(region: Region, graph: fx.Graph, values: Mapping[fx.Node, Any], kinds: Mapping[fx.Node, str]) -> Region:
    """Fill in inputs and outputs. Views of the region's own values that its nodes read are taken into it."""
    inside, foreign = set(region.nodes), set(region.nodes)
    own = {storage_key(t) for n in foreign for t in tensors_in(values[n])}
    stack = [n for node in foreign for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if (
            node not in inside
            and kinds[node] == "view"
            and all(storage_key(t) in own for t in tensors_in(values[node]))
        ):
            inside.add(node)
            stack += node.all_input_nodes
    nodes = [n for n in graph.nodes if n in inside]
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
    wanted = {
        storage_key(t)
        for node in graph.nodes
        if node not in inside
        for n in node.all_input_nodes
        for t in tensors_in(values[n])
    }
    outputs = [
        n for n in nodes if n in foreign and isinstance(values[n], torch.Tensor) and storage_key(values[n]) in wanted
    ]
    return Region(nodes, inputs, outputs)
