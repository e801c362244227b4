"""From the groups of a checkpoint, of any size and order, to those of a `Scheme`: the same codes, scales and zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir.errors import CheckpointFormatError
from accelc.ir.quantized import GROUPS, SCALES, QuantizedWeight, Scheme


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix as a checkpoint means it: weight[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] with
    g = groups[k].

    ``codes`` uint8 [N, K]; ``scales`` [N, G] of a floating dtype; ``zeros`` [N, G], integers, or None for the middle
    of the codes; ``groups`` int64 [K].
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor

    def stored(self, name: str) -> tuple[QuantizedWeight, Tensor | None]:
        """The same matrix as a `QuantizedWeight`, and the order of its columns (int64 [K]) where they had to be moved
        so that those of a group are neighbours: column j of the result is column ``order[j]`` of the matrix.

        Larger groups are split, their scales repeated. Raises CheckpointFormatError when groups are not made of runs
        of 32 columns, or scales are of another dtype.
        """
        if self.scales.dtype not in SCALES.values():
            raise CheckpointFormatError(f"{name}: scales of dtype {self.scales.dtype}")
        order, groups = None, self.groups
        size = _run(groups)
        if size is None:
            order = torch.argsort(groups, stable=True)
            groups = groups[order]
            size = _run(groups)
        if size is None:
            counts = torch.bincount(groups)
            raise CheckpointFormatError(
                f"{name}: its groups have {int(counts.min())} to {int(counts.max())} columns, "
                "which are not made of runs of 32",
                remedy="Quantize the model anew with a group size that is a multiple of 32.",
            )
        zeros = self.zeros
        if zeros is not None and bool((zeros == 1 << (self.bits - 1)).all()):
            zeros = None
        scheme = Scheme(self.bits, size, zeros is None, self.scales.dtype)
        columns = len(groups)
        source = groups[:: size or columns]  # [our groups]
        codes = self.codes if order is None else self.codes[:, order]
        codes = torch.nn.functional.pad(codes, (0, scheme.padded(columns) - columns))
        picked = None if zeros is None else zeros[:, source]
        return QuantizedWeight.of(scheme, codes, self.scales[:, source], picked, columns), order


def neighbours(columns: int, size: int) -> Tensor:
    """Groups [K] of `size` neighbouring columns each; -1 or 0: one for all."""
    return torch.arange(columns) // (size if size > 0 else columns)


def _run(groups: Tensor) -> int | None:
    """The largest size of groups that a scheme can have so that each lies within one of `groups` [K]; 0: one for all,
    None: there is none.
    """
    if bool((groups == groups[0]).all()):
        return 0
    for size in sorted(GROUPS, reverse=True)[:-1]:
        firsts = groups[::size].repeat_interleave(size)[: len(groups)]
        if bool((firsts == groups).all()):
            return size
    return None
