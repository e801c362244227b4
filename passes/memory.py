"""Which nodes may share memory with inputs, with outputs, or with what is written: what a rewrite must keep."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.ir.program import mutated_arguments

Repeats = Callable[[fx.Node], fx.Node | None]
"""The node whose value a node repeats and which will take its place, or None."""


def written_nodes(program: Program) -> set[fx.Node]:
    """Nodes whose memory some operation may write: what it names as mutated, and all that this was computed from."""
    found = set(program.placeholders()[len(program.inputs) :])
    for node in reversed(program.graph.nodes):
        found.update(mutated_arguments(node))
        if node in found:
            found.update(node.all_input_nodes)
    return found


def alias_chain(node: fx.Node, repeats: Repeats) -> Iterator[fx.Node]:
    """`node`, and what its memory may come from: through views, and through operations that `repeats` will remove."""
    current: fx.Node | None = node
    while current is not None:
        yield current
        current = repeats(current) or _viewed(current)


def returned_nodes(program: Program, repeats: Repeats) -> Counter[fx.Node]:
    """In the memory of how many outputs each node may end up."""
    returned: Counter[fx.Node] = Counter()
    for output in program.graph.output_node().all_input_nodes:
        returned.update(alias_chain(output, repeats))
    return returned


def is_view(target: object) -> bool:
    """Whether an operator returns memory of its argument; in a functional graph it then is a view."""
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)


def _viewed(node: fx.Node) -> fx.Node | None:
    """The first argument of a view or of the choice of one result."""
    if (is_view(node.target) or node.target is operator.getitem) and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None
