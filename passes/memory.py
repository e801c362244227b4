"""Which nodes may share memory with inputs, with outputs, or with what is written: what a rewrite must keep."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.ir.program import mutated_arguments


def written_nodes(program: Program) -> set[fx.Node]:
    """Nodes whose memory some operation may write: what it names as mutated, and all that this was computed from."""
    found = set(program.placeholders()[len(program.inputs) :])
    for node in reversed(program.graph.nodes):
        found.update(mutated_arguments(node))
        if node in found:
            found.update(node.all_input_nodes)
    return found


def alias_chain(node: fx.Node, also: Collection[object] = ()) -> Iterator[fx.Node]:
    """`node`, and what its memory may come from: through views, and through the operations in `also`."""
    yield node
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        target = node.target
        is_view = isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)
        if not (is_view or target is operator.getitem or target in also):
            return
        node = node.args[0]
        yield node


def returned_nodes(program: Program, also: Collection[object] = ()) -> Counter[fx.Node]:
    """In the memory of how many outputs each node may end up, if the operations in `also` returned their argument."""
    returned: Counter[fx.Node] = Counter()
    for output in program.graph.output_node().all_input_nodes:
        returned.update(alias_chain(output, also))
    return returned
