"""Tensor functions of fixed shape: what drafters and acceptance rules compute beside the model."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from accelc.runtime.clock import Stopwatch

TensorFunction: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""From tensors to tensors, whose sizes follow from theirs; no values are read. May write to a tensor through the
operations ``accelc::cache_update`` and ``accelc::scatter_rows`` alone."""
Compile: TypeAlias = Callable[[TensorFunction, Sequence[Tensor]], TensorFunction]
"""compile(function, examples): the function for tensors of these sizes and dtypes."""

Call: TypeAlias = Callable[[], tuple[Tensor, ...]]
"""A function with the tensors that it reads and writes at each call."""

REMEMBERED = 4
"""Calls of a function among which one with the same tensors is found: so many sets of them may take turns."""
KEPT = 256
"""Compiled functions that a decoder keeps, each for one set of sizes; and bound ones, each for one set of tensors. A
drafter takes some five for each size of its trees and each batch.
"""


def bound(step: Any, *inputs: Tensor) -> Call:
    """A step with tensors that it reads and writes in place at each call; what a call returns, the next overwrites."""
    return step.bind(*inputs) if hasattr(step, "bind") else functools.partial(step, *inputs)


def put(buffer: Tensor, value: Tensor) -> None:
    """In a tensor function: write value [B, N] int64 into a buffer of its shape that was an input."""
    begin = value[:, 0] - value[:, 0]  # zeros, for which there is a kernel
    torch.ops.accelc.cache_update(buffer, value, begin, 1)


def increase(counts: Tensor, by: Tensor) -> tuple[Tensor]:
    """Add by [B] to counts [B] int64, in place. Returns the sums."""
    more = counts + by
    put(counts[:, None], more[:, None])
    return (more,)


class Functions:
    """Calls tensor functions: compiled for the sizes they are called with, as written without a compiler.

    What is called with the same tensors again is bound to them: it no longer looks at them, and what a call returns,
    the next one with these tensors overwrites. `release` ends that. What was bound before, at these sizes, is bound at
    once where it is called with other tensors, until that proves to be in vain.
    """

    def __init__(self, compile_function: Compile | None = None) -> None:
        self.compiling = Stopwatch()
        """Time spent on that, and on what else is compiled for a decoder."""
        self._compile = None if compile_function is None else self.compiling.timed(compile_function)
        self._known: OrderedDict[tuple[Any, ...], TensorFunction] = OrderedDict()
        self._last: dict[Any, deque[tuple[Tensor, ...]]] = {}
        """What a function was called with last, by sizes: `REMEMBERED` times."""
        self._trusted: set[Any] = set()
        """What was called with the same tensors again, when it was called last but for the first time."""
        self._bound: OrderedDict[tuple[Any, ...], Call] = OrderedDict()
        """By function and identities of tensors, which the bound call holds."""
        self.made: list[Call | None] | None = None
        """Where it is a list: the calls made since, None for those that are not bound."""

    def __call__(self, function: TensorFunction, *inputs: Tensor) -> tuple[Tensor, ...]:
        """function(*inputs). The function is told from others by its identity: make partial ones once."""
        if again := self._bound.get((function, *map(id, inputs))):
            return again() if self.made is None else self._noted(again)
        if self._compile is None:
            self._noted(None)
            return function(*inputs)
        return self._run(function, self._compiled(function, self._compile, inputs), inputs)

    def step(self, step: TensorFunction, *inputs: Tensor) -> tuple[Tensor, ...]:
        """step(*inputs) of something that is compiled already."""
        if again := self._bound.get((step, *map(id, inputs))):
            return again() if self.made is None else self._noted(again)
        return self._run(step, step, inputs)

    def release(self) -> None:
        """Let go of all tensors."""
        self._last.clear()
        self._bound.clear()

    def _compiled(self, function: TensorFunction, compiler: Compile, inputs: tuple[Tensor, ...]) -> TensorFunction:
        key = (function, *[tensor.shape for tensor in inputs])
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = compiler(function, inputs)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found

    def _noted(self, call: Call | None) -> tuple[Tensor, ...]:
        """Run a bound call, if there is one, and note it where calls are noted."""
        if self.made is not None:
            self.made.append(call)
        return call() if call else ()

    def _run(self, name: object, step: TensorFunction, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._noted(None)
        key = (name, *[tensor.shape for tensor in inputs])
        last = self._last.setdefault(key, deque(maxlen=REMEMBERED))
        again = any(all(a is b for a, b in zip(known, inputs)) for known in last)
        last.append(inputs)
        if again:
            if len(self._trusted) >= KEPT:
                self._trusted.clear()
            self._trusted.add(key)
        elif len(last) == REMEMBERED:
            self._trusted.discard(key)
        if key not in self._trusted or not all(tensor.is_contiguous() for tensor in inputs):
            return step(*[tensor.contiguous() for tensor in inputs])
        call = self._bound[(name, *map(id, inputs))] = bound(step, *inputs)
        if len(self._bound) > KEPT:
            self._bound.popitem(last=False)
        return call()
