"""Shapes of a program's values at given sizes.

Plans are made for concrete sizes, so shapes are numbers, found by running the program on meta tensors: 20 ms for 16
Llama layers, where symbolic shapes took 900 ms and fake tensors 200 ms. Only regions that go to Inductor need symbols
(`accelc.codegen.symbolic`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from accelc.codegen.errors import ShapeError
from accelc.ir.errors import around

Dims = Mapping[int, str]
"""Which dims of an input vary, by the name of the size: {0: "B", 1: "N"}."""


class _Propagate(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[int, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except (NotImplementedError, RuntimeError) as error:
            raise ShapeError(
                f"the shape of {n.target} depends on values: {error}",
                where="\n" + around(n.graph, n),
                remedy="Compile with backend='eager'.",
            ) from error
        if n.op == "get_attr" and isinstance(result, torch.Tensor):
            result = self.constants.setdefault(id(result), _like(result))
        self.values[n] = result
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Operations that make tensors from numbers make them on the meta device."""
        if "device" in kwargs or (isinstance(target, torch._ops.OpOverload) and _makes_tensors(target)):
            kwargs = {**kwargs, "device": "meta"}
        return super().call_function(target, args, kwargs)


def _makes_tensors(target: torch._ops.OpOverload) -> bool:
    names = {a.name: str(a.type) for a in target._schema.arguments}
    return "device" in names and not any("Tensor" in kind for kind in names.values())


def _like(value: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same layout, storage offset included."""
    extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride())) + 1 if value.numel() else 0
    storage = torch.empty(value.storage_offset() + extent, dtype=value.dtype, device="meta")
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def propagate(
    gm: fx.GraphModule, inputs: Sequence[torch.Tensor], dims: Sequence[Dims], sizes: Mapping[str, int]
) -> dict[fx.Node, Any]:
    """The value of every node at `sizes`: meta tensors that share storage as the real ones will, and numbers.

    `inputs` give dtypes and fixed sizes; `dims` name the varying ones. Raises `ShapeError` where a shape depends on
    the values of tensors.
    """
    arguments = []
    for value, named in zip(inputs, dims, strict=True):
        shape = [sizes[named[d]] if d in named else n for d, n in enumerate(value.shape)]
        arguments.append(torch.empty(shape, dtype=value.dtype, device="meta"))
    run = _Propagate(gm)
    with torch.no_grad():
        run.run(*arguments)
    return run.values
