"""Arrays: where the bytes of a value lie, at given sizes. What instructions are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3, torch.bool: 4}
"""DType of codegen/cpu/plan.h."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BY_ITEMSIZE = {8: 3, 4: 0, 2: 1, 1: 4}
"""For copies without arithmetic any code of the right width serves."""
MAX_DIMS = 6


@dataclass(frozen=True)
class Array:
    """A strided view of a storage: `root` names the storage, `offset` and `stride` count elements."""

    root: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.size)

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def unit(self) -> bool:
        """Whether neighbours along the last dim are neighbours in memory."""
        return self.ndim > 0 and (self.stride[-1] == 1 or self.size[-1] == 1)

    def expand(self, size: Sequence[int]) -> Array:
        """Broadcast to `size`, by zero strides."""
        lead = len(size) - self.ndim
        stride = [0] * lead + [
            0 if have == 1 and want != 1 else s for have, want, s in zip(self.size, size[lead:], self.stride)
        ]
        return replace(self, size=tuple(size), stride=tuple(stride))

    def viewed(self, size: Sequence[int]) -> Array:
        """The same contiguous memory in another shape."""
        return replace(self, size=tuple(size), stride=contiguous(size))

    def unsqueeze(self, dim: int) -> Array:
        """With a dim of size 1 before `dim`."""
        size, stride = list(self.size), list(self.stride)
        size.insert(dim, 1)
        stride.insert(dim, 0)
        return replace(self, size=tuple(size), stride=tuple(stride))

    def transposed(self) -> Array:
        """With the last two dims exchanged."""
        size, stride = self.size, self.stride
        return replace(self, size=(*size[:-2], size[-1], size[-2]), stride=(*stride[:-2], stride[-1], stride[-2]))

    def last(self, dim: int) -> Array:
        """With one dim moved to the end."""
        order = [d for d in range(self.ndim) if d != dim % self.ndim] + [dim % self.ndim]
        return replace(self, size=tuple(self.size[d] for d in order), stride=tuple(self.stride[d] for d in order))

    def batched(self) -> Array | None:
        """[Z, M, N] with the leading dims merged into one; None where they do not merge."""
        lead = merge(self.size[:-2], self.stride[:-2]) or [(1, 0)]
        if len(lead) > 1:
            return None
        return replace(self, size=(lead[0][0], *self.size[-2:]), stride=(lead[0][1], *self.stride[-2:]))

    def narrow(self, dim: int, start: int, length: int) -> Array:
        """Indices [start, start + length) of one dim."""
        size = tuple(length if d == dim else n for d, n in enumerate(self.size))
        return replace(self, size=size, offset=self.offset + start * self.stride[dim])

    def matrix(self, inner: int = 1) -> Array | None:
        """[rows, last dims merged], where the leading dims merge into one stride; None where they do not."""
        lead = merge(self.size[: self.ndim - inner], self.stride[: self.ndim - inner])
        tail = merge(self.size[self.ndim - inner :], self.stride[self.ndim - inner :])
        if len(lead) > 1 or len(tail) > 1:
            return None
        (rows, step), (columns, unit) = (lead or [(1, 0)])[0], (tail or [(1, 1)])[0]
        return replace(self, size=(rows, columns), stride=(step, unit))


def contiguous(size: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    strides, step = [], 1
    for n in reversed(size):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def merge(size: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dims that walk the same memory in the same order."""
    merged: list[tuple[int, int]] = []
    for n, s in zip(size, stride):
        if n == 1:
            continue
        if merged and merged[-1][1] == n * s:
            merged[-1] = (merged[-1][0] * n, s)
        else:
            merged.append((n, s))
    return merged


def merge_together(arrays: Sequence[Array | None]) -> list[Array | None]:
    """Arrays of one shape with the dims merged that merge in all of them: fewer, longer rows. Keeps at least one
    dim.
    """
    shape = next(a for a in arrays if a is not None).size
    keep: list[list[int]] = []  # groups of dims
    for d, n in enumerate(shape):
        if n == 1:
            continue
        if keep and all(a is None or a.stride[keep[-1][-1]] == n * a.stride[d] for a in arrays):
            keep[-1].append(d)
        else:
            keep.append([d])
    size = tuple(math.prod(shape[d] for d in group) for group in keep) or (1,)
    result: list[Array | None] = []
    for a in arrays:
        stride = tuple(a.stride[group[-1]] for group in keep) or (1,) if a is not None else ()
        result.append(None if a is None else replace(a, size=size, stride=stride))
    return result
