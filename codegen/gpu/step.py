"""The step of one token on a GPU: Inductor fuses what stands between the kernels of the dialect.

Attention, cache writes and products with weights in few bits stay operations of their own, which have Triton kernels;
the dialect's other operations are expanded to their references, so that Inductor merges norms, rotary embeddings,
gates and residual sums with each other. Steps of several tokens run node by node: their shapes are many.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Program
from accelc.ir.compat import INDUCTOR_ERRORS, compile_whole
from accelc.ir.dialect import REFERENCES
from accelc.ir.errors import first_line

log = logging.getLogger(__name__)

KERNELS = (torch.ops.accelc.attention.default,)
"""Of the operations that have references: those with Triton kernels."""


class GpuStep:
    """Runs a step program [B, N]: compiled where N is 1, else, and where that fails, node by node.

    ``compiler``: what makes a faster callable of a graph module, by default torch.compile. ``notice`` says why the
    compiled form is not used, where it is not.
    """

    def __init__(
        self,
        program: Program,
        run: Callable[..., tuple[Tensor, ...]],
        compiler: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
    ) -> None:
        self._run = run
        self._compiled: Callable[..., Any] | None = (compiler or compile_whole)(expanded(program))
        self.notice = ""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: tokens [B, N], ..., states; mutates the states and returns the outputs."""
        if self._compiled is None or inputs[0].shape[1] != 1:
            return self._run(*inputs)
        try:
            return tuple(self._compiled(*inputs))
        except INDUCTOR_ERRORS as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # a graph that cannot be captured is not the compiler's failure
            self.notice = f"the step of one token runs node by node: {type(error).__name__}: {first_line(error)}"
            log.warning(self.notice)
            self._compiled = None
            return self._run(*inputs)


def expanded(program: Program) -> fx.GraphModule:
    """A copy that shares the tensors, in which operations without a kernel are their references."""
    module = program.clone().module
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target not in KERNELS:
            node.target = REFERENCES.get(node.target, node.target)
    return fx.GraphModule(module, module.graph)  # with code of its own: dynamo inlines no lazy module
