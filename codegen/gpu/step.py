"""The step of one token on a GPU: Inductor fuses what stands between the kernels of the dialect.

Attention, cache writes and products with weights in few bits stay operations of their own, which have Triton kernels;
the dialect's other operations are expanded to their references, so that Inductor merges norms, rotary embeddings,
gates and residual sums with each other. Steps of several tokens run node by node: their shapes are many.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir.compat import INDUCTOR_ERRORS, compile_whole
from accelc.ir.dialect import REFERENCES

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
        module: fx.GraphModule,
        run: Callable[..., tuple[Tensor, ...]],
        compiler: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
    ) -> None:
        self._run = run
        self._compiled: Callable[..., Any] | None = (compiler or compile_whole)(expanded(module))
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
            first = (str(error).strip().splitlines() or [""])[0]
            self.notice = f"the step of one token runs node by node: {type(error).__name__}: {first}"
            log.warning(self.notice)
            self._compiled = None
            return self._run(*inputs)


def expanded(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares the tensors, in which operations without a kernel are their references."""
    graph = fx.Graph()
    made = fx.GraphModule(module, graph)
    remap: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copy = remap[node] = graph.node_copy(node, remap.__getitem__)
        if node.op == "call_function" and node.target not in KERNELS:
            copy.target = REFERENCES.get(node.target, node.target)
        if node.op == "get_attr":
            _share(module, made, str(node.target))
    made.recompile()
    return made


def _share(source: torch.nn.Module, target: torch.nn.Module, path: str) -> None:
    """Give `target` the tensor that `source` has at a path."""
    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(target, owner):
            target.add_module(owner, torch.nn.Module())
        source, target = getattr(source, owner), getattr(target, owner)
    value = getattr(source, name)
    if name in target._parameters or name in target._buffers or hasattr(target, name):
        return
    if isinstance(value, torch.nn.Parameter):
        target.register_parameter(name, value)
    else:
        target.register_buffer(name, value)


def examples(names: Sequence[str], states: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Inputs of a step of one token of one row, by name, and its states."""
    made = {
        "tokens": torch.zeros(1, 1, dtype=torch.int64, device=device),
        "positions": torch.zeros(1, 1, dtype=torch.int64, device=device),
        "lengths": torch.zeros(1, dtype=torch.int64, device=device),
    }
    return [*(made[name] for name in names if name in made), *states]
