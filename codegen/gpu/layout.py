"""Weights in few bits in the order in which a GPU's tensor cores take them.

A product of few rows is computed as Y^T = W X^T, so that a tile of W is the first operand of the matrix instruction.
NVIDIA's 16-bit instructions (mma.m16n8k16, wgmma.m64nNk16) want it in registers so: lane l of a warp holds of each
16 x 16 block the elements of the rows l / 4 and l / 4 + 8 and of the columns 2 (l % 4) + {0, 1} and 8 more. Codes are
stored in that order, so that a kernel reads 16 bytes a lane, unpacks them in registers, and has the operand without any
exchange between lanes (the idea of MARLIN, Frantar et al. 2024, section 3.4, in an order of our own).

A *unit* is 64 rows by 64 columns of 4 bits or 32 of 8 bits (32 of 4 bits where groups are 32 long): one vector of each
of 128 lanes. It is stored as int16 elements, a pair of which is one register:

- The index of an element, from the slowest bit: row bits 5, 4 (the warp), row bits 2, 1, 0 and column bits 2, 1 (the
  lane), the upper column bits, and column bit 0, so that the two halves of a register hold neighbours.
- In an element, 4-bit code j = 0..3 lies at bit 4 j, 8-bit code j = 0, 1 at bit 8 j. Bit 0 of j is row bit 3, bit 1 of
  j is column bit 3; of 8-bit codes, column bit 3 is the lowest of the upper column bits.

Units of one band of 64 rows follow each other along K, so that a program streams through memory. Scales and zeros of a
band and a group lie together, rows r and r + 8 side by side, because the same lane multiplies by both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir.quantized import QuantizedWeight, Scheme, deinterleave, unpack

from .errors import KernelInputError

BAND = 64
"""Rows of a unit."""
STEP = 128
"""Columns are padded to a multiple, and to whole groups; padding has scale 0."""


@dataclass(frozen=True)
class TiledWeight:
    """A weight [N, K] in few bits, in the order of the matrix instruction's registers.

    ``codes`` int16 [bands, units, elements] (see the module), bands = N / 64 rounded up; ``scales`` and, for asymmetric
    schemes, ``zeros`` [bands, groups, 64]; ``rows`` is N and ``columns`` K.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    columns: int

    @property
    def padded(self) -> int:
        """Columns with padding."""
        return padded_columns(self.scheme, self.columns)

    @property
    def groups(self) -> int:
        """Groups of a row, those of padding included."""
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors: what a product must read."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros) if t is not None)

    def to(self, device: torch.device | str) -> TiledWeight:
        """The same weight on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return TiledWeight(
            self.scheme, self.codes.to(device), self.scales.to(device), zeros, self.rows, self.columns
        )  # fmt: skip


def unit_columns(scheme: Scheme) -> int:
    """Columns of a unit."""
    return 64 if scheme.bits == 4 and scheme.group != 32 else 32


def padded_columns(scheme: Scheme, columns: int) -> int:
    """Columns that a row of `columns` weights takes: whole steps of 128, and whole groups."""
    multiple = max(STEP, scheme.group)
    return -(-columns // multiple) * multiple


def tile_weight(weight: QuantizedWeight) -> TiledWeight:
    """Bring a `QuantizedWeight` [N, K] into the order of registers, on its device. Raises KernelInputError for weights
    with more dims.
    """
    if weight.codes.ndim != 3:
        raise KernelInputError(f"a weight of {weight.codes.ndim - 1} dims", where=f"weight {list(weight.shape)}")
    scheme, rows, columns = weight.scheme, weight.rows, weight.columns
    padded = padded_columns(scheme, columns)
    codes = unpack(weight.codes, scheme.bits, rows)[:, :columns]
    codes = torch.nn.functional.pad(codes, (0, padded - columns, 0, -rows % BAND))
    groups = padded // scheme.group if scheme.group else 1
    scales = _tile_rows(deinterleave(weight.scales, rows), groups)
    zeros = None if weight.zeros is None else _tile_rows(deinterleave(weight.zeros, rows), groups)
    return TiledWeight(scheme, pack_units(codes, scheme), scales, zeros, rows, columns)


def untile_weight(weight: TiledWeight) -> QuantizedWeight:
    """The inverse of `tile_weight`."""
    scheme, rows = weight.scheme, weight.rows
    kept = scheme.padded(weight.columns)
    codes = unpack_units(weight.codes, scheme)[:rows, : weight.columns]
    codes = torch.nn.functional.pad(codes, (0, kept - weight.columns))
    groups = scheme.groups(weight.columns)
    scales = _untile_rows(weight.scales)[:rows, :groups]
    zeros = None if weight.zeros is None else _untile_rows(weight.zeros)[:rows, :groups]
    return QuantizedWeight.of(scheme, codes, scales, zeros, weight.columns)


def pack_units(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes uint8 [N, C], N and C whole units, to int16 [bands, units, elements]."""
    wide = unit_columns(scheme)
    # rows: band, bits 5-4, bit 3, bits 2-0; columns: unit, upper bits, bit 3, bits 2-1, bit 0
    parts = codes.unflatten(0, (-1, 4, 2, 8)).unflatten(-1, (-1, wide // 16, 2, 4, 2))
    if scheme.bits == 4:
        parts = parts.permute(0, 4, 1, 3, 7, 5, 8, 6, 2)  # ..., column bit 0; then j = (column bit 3, row bit 3)
    else:
        parts = parts.permute(0, 4, 1, 3, 7, 5, 6, 8, 2)  # ..., column bits 3 and 0; then j = row bit 3
    fields = parts.flatten(7) if scheme.bits == 4 else parts
    weights = torch.tensor([1 << scheme.bits * j for j in range(16 // scheme.bits)], device=codes.device)
    values = (fields.to(torch.int32) * weights.to(torch.int32)).sum(-1)
    signed = torch.where(values >= 1 << 15, values - (1 << 16), values).to(torch.int16)
    return signed.flatten(2).contiguous()


def unpack_units(units: Tensor, scheme: Scheme) -> Tensor:
    """Int16 [bands, units, elements] to codes uint8 [N, C]; the inverse of `pack_units`."""
    wide = unit_columns(scheme)
    shifts = torch.arange(0, 16, scheme.bits, dtype=torch.int32, device=units.device)
    fields = (units.to(torch.int32)[..., None] >> shifts) & (scheme.levels - 1)
    if scheme.bits == 4:
        parts = fields.unflatten(2, (4, 8, 4, wide // 16, 2)).unflatten(-1, (2, 2))
        parts = parts.permute(0, 2, 8, 3, 1, 5, 7, 4, 6)
    else:
        parts = fields.unflatten(2, (4, 8, 4, wide // 16, 2, 2))
        parts = parts.permute(0, 2, 8, 3, 1, 5, 6, 4, 7)
    return parts.to(torch.uint8).flatten(4).flatten(0, 3).contiguous()


def _tile_rows(matrix: Tensor, groups: int) -> Tensor:
    """[N, G] to [bands, groups, 64]: padded with zeros, rows r and r + 8 side by side."""
    padded = torch.nn.functional.pad(matrix, (0, groups - matrix.shape[1], 0, -matrix.shape[0] % BAND))
    parts = padded.unflatten(0, (-1, 4, 2, 8))  # band, bits 5-4, bit 3, bits 2-0, group
    return parts.permute(0, 4, 1, 3, 2).flatten(2).contiguous()


def _untile_rows(tiles: Tensor) -> Tensor:
    """[bands, groups, 64] to [N, groups]; the inverse of `_tile_rows`."""
    parts = tiles.unflatten(2, (4, 8, 2))  # band, group, bits 5-4, bits 2-0, bit 3
    return parts.permute(0, 2, 4, 3, 1).flatten(0, 3).contiguous()
