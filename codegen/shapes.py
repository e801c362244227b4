"""Shapes of a program's values, in symbols: one propagation serves every batch size and token count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from accelc.ir.compat import FakeShapes, fake_shapes

Dims = Mapping[int, str]
"""Which dims of an input vary, by the name of the size: {0: "B", 1: "N"}."""


@dataclass
class Shapes:
    """The fake value of every node, and how to turn symbolic sizes into numbers.

    ``sizes``: the sizes that were fixed while propagating (a size of 1 always is: code for 1 and for more differs).
    """

    values: dict[fx.Node, Any]
    fakes: FakeShapes
    sizes: Mapping[str, int | None]
    memo: dict[tuple[tuple[str, int], ...], dict[Any, int]] = field(default_factory=dict)

    def covers(self, sizes: Mapping[str, int]) -> bool:
        """Whether the propagated shapes hold at these sizes: every assumption made on the way must be true there."""
        fixed = all(want is None or sizes[name] == want for name, want in self.sizes.items())
        return fixed and self.fakes.holds(sizes)

    def number(self, value: Any, sizes: Mapping[str, int]) -> int:
        """A size, stride or offset at these sizes."""
        return value if isinstance(value, int) else self.fakes.evaluate(value, sizes)


class _Propagate(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, fakes: FakeShapes) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.fakes = fakes
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[int, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, torch.Tensor):
            result = self.constants.setdefault(id(result), self.fakes.constant(result))
        self.values[n] = result
        return result


def propagate(
    gm: fx.GraphModule, inputs: Sequence[torch.Tensor], dims: Sequence[Dims], sizes: Mapping[str, int | None]
) -> Shapes:
    """Run `gm` on fake tensors. `sizes`: a number for a fixed size, None for one that stays a symbol."""
    fakes = fake_shapes([name for name, size in sizes.items() if size is None])
    arguments = []
    for value, named in zip(inputs, dims, strict=True):
        shape: list[Any] = list(value.shape)
        for dim, name in named.items():
            shape[dim] = fakes.symbols[name] if sizes[name] is None else sizes[name]
        arguments.append(fakes.empty(shape, value.dtype))
    run = _Propagate(gm, fakes)
    with fakes.mode, torch.no_grad():
        run.run(*arguments)
    return Shapes(run.values, fakes, dict(sizes))
