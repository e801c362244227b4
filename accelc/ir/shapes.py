"""Shape propagation: fake values for every node, with batch, new tokens and slots as symbols."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from accelc.ir.compat import fake_execution, symbolic_values
from accelc.ir.errors import InvariantError, around
from accelc.ir.program import Program, fetch

SYMBOLS = {"B": (3, 1, 1 << 16), "N": (5, 1, 1 << 16), "S": (29, 2, 1 << 24), "T": (7, 1, 1 << 24), "W": (2, 1, 16)}
"""Hint, least and greatest value of each symbol; the hints only have to differ from each other."""

INPUTS = "inputs"
"""`Program.facts` under this name: shape and dtype of inputs that `SHAPES` does not know."""

SHAPES: dict[str, tuple[str | int, ...]] = {
    "tokens": ("B", "N"),
    "positions": ("B", "N"),
    "lengths": ("B",),
    "tree": ("B", "N", "W"),
    "last": ("B",),
    "path": ("B", "N"),
    "counts": ("B",),
    "root": ("B", 1),
}
"""Shapes of a step's inputs; all are int64."""


def input_shape(program: Program, name: str) -> tuple[tuple[str | int, ...], torch.dtype]:
    """Shape and dtype of an input of a step program, or of a program made of one."""
    if name in SHAPES:
        return SHAPES[name], torch.int64
    return program.facts[INPUTS][name]  # type: ignore[index, no-any-return]


def propagate(program: Program) -> None:
    """Set ``meta["val"]`` of every node of a step program to a fake tensor with symbolic sizes.

    Raises InvariantError, with the nodes around it, where an operation does not accept its inputs.
    """
    specs = {s.name: s for s in program.states}
    device = program.device
    described = []
    for node in program.placeholders():
        spec = specs.get(str(node.target))
        shape, dtype = (spec.shape, spec.dtype) if spec else input_shape(program, str(node.target))
        described.append((shape, dtype, device))
    values = symbolic_values(described, SYMBOLS)
    known: dict[fx.Node, Any] = dict(zip(program.placeholders(), values, strict=True))
    static: dict[str, Any] = {}
    with fake_execution(values) as fake:
        for node in program.graph.nodes:
            if node.op == "get_attr":
                path = str(node.target)
                if path not in static:
                    static[path] = fake(fetch(program.module, path))
                known[node] = static[path]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                try:
                    known[node] = node.target(*args, **kwargs)
                except Exception as error:  # operators raise anything; the node is what matters
                    raise InvariantError(
                        f"{node.name} does not accept its inputs: {error}", where="\n" + around(program.graph, node)
                    ) from error
            if node in known:
                node.meta["val"] = known[node]
