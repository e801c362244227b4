"""What torch.export returns, as a plain graph module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx
from torch import nn

from accelc.capture_failure import DATA_REMEDY, source_of
from accelc.ir.errors import CaptureError
from accelc.ir.program import graph_module, store


def is_functional(graph: fx.Graph) -> bool:
    """Whether no operator writes to its arguments and no subgraph call is left (then decomposition, which is slow, is
    moot).
    """
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return False
    return True


def plain_module(exported: torch.export.ExportedProgram, inputs: Sequence[str]) -> fx.GraphModule:
    """The exported graph with parameters, buffers and constants as get_attr nodes and inputs of these names."""
    signature = exported.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    if signature.buffers_to_mutate:
        written = ", ".join(sorted(name.removeprefix("model.") for name in signature.buffers_to_mutate.values()))
        raise CaptureError(
            f"the forward writes to its buffers: {written}",
            remedy="Compute the value from the ids: a forward that counts or remembers calls has no cached step.",
        )
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"the forward calls {node.target}, which runs another graph", where=source_of(node), remedy=DATA_REMEDY
            )
    tensors = {**dict(exported.state_dict), **exported.constants}
    root = nn.Module()
    graph = fx.Graph()
    named = iter(inputs)
    remap: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            if not node.users:
                continue
            path = names[node.name].removeprefix("model.")
            store(root, path, tensors[names[node.name]])
            new = graph.get_attr(path)
            new.name = node.name
        elif node.op == "placeholder":
            new = graph.placeholder(next(named))
        elif node.op == "output":
            graph.output(tuple(remap[value] for value in node.args[0]))
            continue
        else:
            new = graph.node_copy(node, remap.__getitem__)
        new.meta = dict(node.meta)
        remap[node] = new
    return graph_module(root, graph)
