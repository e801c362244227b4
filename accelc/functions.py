"""Compiles tensor functions of the runtime by the code generation that steps go through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from accelc.codegen import Options, compile_program
from accelc.runtime.functions import TensorFunction


def compile_function(function: TensorFunction, examples: Sequence[Tensor]) -> TensorFunction:
    """The function for tensors of these sizes and dtypes: traced, then compiled like any program."""
    with torch.inference_mode(False), torch.no_grad():
        given = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in examples]
        module = make_fx(lambda *inputs: function(*inputs), tracing_mode="fake")(*given)  # methods cannot be traced
        for node in list(module.graph.nodes):
            if node.target is torch.ops.aten.lift_fresh_copy.default:  # a constant, which nothing writes to
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        return compile_program(module, given, dynamic={}, options=Options(huge_pages=False))
