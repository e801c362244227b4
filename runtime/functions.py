"""Tensor functions of fixed shape: what drafters and acceptance rules compute beside the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

TensorFunction: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""From tensors to tensors, whose sizes follow from theirs; no values are read. May write to a tensor through the
operation ``accelc::cache_update`` alone."""
Compile: TypeAlias = Callable[[TensorFunction, Sequence[Tensor]], TensorFunction]
"""compile(function, examples): the function for tensors of these sizes and dtypes."""

KEPT = 64
"""Compiled functions that a decoder keeps, each for one set of sizes."""


class Functions:
    """Calls tensor functions: compiled for the sizes they are called with, as written without a compiler."""

    def __init__(self, compile_function: Compile | None = None) -> None:
        self._compile = compile_function
        self._known: OrderedDict[tuple[Any, ...], TensorFunction] = OrderedDict()

    def __call__(self, function: TensorFunction, *inputs: Tensor) -> tuple[Tensor, ...]:
        """function(*inputs). The function is told from others by its identity: make partial ones once."""
        if self._compile is None:
            return function(*inputs)
        key = (function, *[tensor.shape for tensor in inputs])
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._compile(function, inputs)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found(*[tensor.contiguous() for tensor in inputs])
