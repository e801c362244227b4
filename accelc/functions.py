"""Compiles tensor functions of the runtime: on CPUs by the code generation that steps go through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from accelc.codegen import Options, compile_program
from accelc.runtime.functions import TensorFunction


def compile_function(function: TensorFunction, examples: Sequence[Tensor]) -> TensorFunction:
    """The function for tensors of these sizes and dtypes: traced, then compiled like any program.

    On a GPU it runs operation by operation, with its constants on the device since it was traced.
    """
    with torch.inference_mode(False), torch.no_grad():
        given = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in examples]
        module = make_fx(lambda *inputs: function(*inputs), tracing_mode="fake")(*given)  # methods cannot be traced
        for node in list(module.graph.nodes):
            if node.target is torch.ops.aten.lift_fresh_copy.default:  # a constant, which nothing writes to
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        if given[0].device.type == "cpu":
            return compile_program(module, given, dynamic={}, options=Options(huge_pages=False))
        compute_constants(module)
        return module


def compute_constants(module: fx.GraphModule) -> None:
    """Compute once what no input reaches: a copy of a constant to the device would make the host wait each time."""
    known: dict[fx.Node, Tensor] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "call_function" and all(parent in known for parent in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            value = node.target(*args, **kwargs)
            name = f"_constant_{len(known)}"
            module.register_buffer(name, value, persistent=False)
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            node.replace_all_uses_with(constant)
            known[constant] = value
    module.graph.eliminate_dead_code()
    module.recompile()
