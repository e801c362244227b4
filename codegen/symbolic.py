"""Values of a program in symbols, for the regions that Inductor compiles: one artifact serves every size from 2 on.

Made on demand: symbolic shapes cost a second for a model of 16 layers, and most programs need none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from accelc.codegen.shapes import Dims
from accelc.ir.compat import FakeShapes, fake_shapes, on_fakes


@dataclass
class Symbolic:
    """The fake value of every node. ``sizes``: a number for a fixed size, None for one that is a symbol."""

    values: dict[fx.Node, Any]
    fakes: FakeShapes
    sizes: Mapping[str, int | None]

    def covers(self, sizes: Mapping[str, int]) -> bool:
        """Whether the values hold at these sizes: every assumption made on the way must be true there."""
        fixed = all(want is None or sizes[name] == want for name, want in self.sizes.items())
        return fixed and self.fakes.holds(sizes)


class SymbolicValues:
    """Finds the symbolic values that cover given sizes, and keeps them."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[torch.Tensor], dims: Sequence[Dims]) -> None:
        self._gm, self._inputs, self._dims = gm, inputs, dims
        self._known: list[Symbolic] = []

    def at(self, sizes: Mapping[str, int]) -> Symbolic:
        """Values with a symbol for every size above 1, unless the program then assumes too much about `sizes`."""
        found = next((known for known in self._known if known.covers(sizes)), None)
        if found is None:
            found = self._propagate({name: 1 if size == 1 else None for name, size in sizes.items()})
            if not found.covers(sizes):
                found = self._propagate(dict(sizes))
            self._known.append(found)
        return found

    def _propagate(self, sizes: Mapping[str, int | None]) -> Symbolic:
        fakes = fake_shapes([name for name, size in sizes.items() if size is None])
        arguments = []
        for value, named in zip(self._inputs, self._dims, strict=True):
            shape: list[Any] = list(value.shape)
            for dim, name in named.items():
                shape[dim] = fakes.symbols[name] if sizes[name] is None else sizes[name]
            arguments.append(fakes.empty(shape, value.dtype))
        run = _Propagate(self._gm, fakes)
        with on_fakes(fakes.mode):
            run.run(*arguments)
        return Symbolic(run.values, fakes, dict(sizes))


class _Propagate(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, fakes: FakeShapes) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.fakes = fakes
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, torch.Tensor):
            result = self.fakes.constant(result)
        self.values[n] = result
        return result
