"""Programs of one operation, to hold a kernel against its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from accelc.codegen import CompiledStep, Options


def single(target: Callable[..., Any], args: tuple[Any, ...], view: dict[int, tuple[int, int]] | None = None) -> Any:
    """A graph that applies `target` to placeholders for the tensors in `args`; returns it and those tensors.

    `view[i] = (d, e)`: argument i is handed in with these dims exchanged in memory, and exchanged back in the graph.
    """
    graph, tensors, nodes = fx.Graph(), [], []
    for index, value in enumerate(args):
        if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
            names = [f"argument_{index}_{i}" if isinstance(v, Tensor) else None for i, v in enumerate(value)]
            nodes.append([graph.placeholder(name) if name else None for name in names])
            tensors += [v for v in value if isinstance(v, Tensor)]
            continue
        if not isinstance(value, Tensor):
            nodes.append(value)
            continue
        node = graph.placeholder(f"argument_{index}")
        if view and index in view:
            value = value.transpose(*view[index]).contiguous()
            node = graph.call_function(torch.ops.aten.transpose.int, (node, *view[index]))
        tensors.append(value)
        nodes.append(node)
    result = graph.call_function(target, tuple(nodes))
    graph.output((result,))
    return fx.GraphModule(torch.nn.Module(), graph), tensors


def run_single(
    target: Callable[..., Any],
    *args: Any,
    view: dict[int, tuple[int, int]] | None = None,
    march: str = "native",
    threads: int = 0,
) -> Tensor:
    """The operation's result from a compiled program; fails when no kernel covered it."""
    gm, tensors = single(target, args, view)
    step = CompiledStep(gm, tensors, {}, Options(march=march, threads=threads))
    assert not step.report.foreign, f"no kernel for {step.report.foreign}"
    return step(*tensors)[0]
