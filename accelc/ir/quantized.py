"""Weight-only quantization: how weights are stored in few bits. The operations that read them are in `quantized_ops`.

A weight [..., N, K] is cut into groups of `group` neighbours along K, the dim that products contract. Element k of a
row is `(code - zero) * scale` with the scale and zero of its group. Codes are unsigned; a symmetric scheme has the zero
2^(bits - 1) everywhere and stores none.

Layout: rows are taken 16 at a time, LANES of a vector register, and lie interleaved, so that a product streams through
memory and sums one row a lane. Of each row a word of four bytes follows that of the row before: four codes of 8 bits,
or eight of 4 bits, byte j holding code j in its low and code j + 4 in its high half. Scales and zeros are interleaved
in the same way. Rows are padded to whole lanes, columns to whole groups and multiples of 32; padding is never used.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accelc.ir.errors import InputError

BITS = (4, 8)
GROUPS = (0, 32, 64, 128, 256)
"""Sizes of groups; 0: one a row."""
LANES = 16
"""Rows that lie interleaved."""
WORD = 4
"""Bytes of a row that lie together."""
UNIT = 32
"""Columns are padded to a multiple."""
SCALES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized: ``bits`` a code, ``group`` codes a scale (0: the whole row), and whether zero is in
    the middle of the codes (``symmetric``) or stored for each group as well. Scales and zeros have ``scale_dtype``.

    Written ``int4``, ``int4:g32``, ``int8:row``, ``int4:g128:asym:fp32``; scales are bf16 with int4 and fp32 with int8
    unless said: half a step in 127 is lost to a scale with the 8 bits of bf16. Raises InputError.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group not in GROUPS or self.scale_dtype not in SCALES.values():
            raise InputError(f"no such quantization: {self.bits} bits, group {self.group}, {self.scale_dtype}",
                             remedy=_CHOICES)  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that a text such as "int4:g64:asym" means."""
        head, *parts = text.lower().split(":") if isinstance(text, str) else [""]
        if head not in ("int4", "int8"):
            raise InputError(f"unknown quantization scheme {text!r}", remedy=_CHOICES)
        scheme = cls(4, 128) if head == "int4" else cls(8, 0, scale_dtype=torch.float32)
        said: dict[str, object] = {}
        for part in parts:
            if part in SCALES:
                name, value = "scale_dtype", SCALES[part]
            elif part in ("sym", "asym"):
                name, value = "symmetric", part == "sym"
            elif part == "row" or re.fullmatch(r"g[1-9][0-9]*", part):
                name, value = "group", 0 if part == "row" else int(part[1:])
            else:
                raise InputError(f"unknown part {part!r} of the quantization scheme {text!r}", remedy=_CHOICES)
            if name in said:
                what = {"scale_dtype": "dtype of scales", "symmetric": "symmetry"}.get(name, name)
                raise InputError(f"the quantization scheme {text!r} says its {what} twice", remedy=_CHOICES)
            said[name] = value
        return replace(scheme, **said)  # type: ignore[arg-type]

    def __str__(self) -> str:
        parts = [f"int{self.bits}", f"g{self.group}" if self.group else "row"]
        parts += [] if self.symmetric else ["asym"]
        dtype = next(name for name, dtype in SCALES.items() if dtype == self.scale_dtype)
        return ":".join([*parts, *([] if dtype == ("bf16" if self.bits == 4 else "fp32") else [dtype])])

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero of a symmetric scheme."""
        return self.levels // 2

    def padded(self, columns: int) -> int:
        """Codes that a row of `columns` weights takes."""
        unit = math.lcm(UNIT, self.group or 1)
        return -(-columns // unit) * unit

    def groups(self, columns: int) -> int:
        """Groups of a row, those of padding included."""
        return self.padded(columns) // self.group if self.group else 1

    def bits_per_weight(self, columns: int) -> float:
        """Bits that one weight of a row of `columns` takes, scales, zeros and padding included."""
        each = self.scale_dtype.itemsize * 8 * (1 if self.symmetric else 2)
        return (self.padded(columns) * self.bits + self.groups(columns) * each) / columns


_CHOICES = (
    "Write int8 or int4, then any of: row, g32, g64, g128, g256 (codes a scale), sym or asym, bf16, fp16 or fp32 "
    "(scales), joined by colons: int4:g64:asym."
)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [..., N, K] in few bits.

    ``codes`` uint8 [..., P, padded K * bits / 32, 64], P = N / 16 rounded up; ``scales`` and, for asymmetric schemes,
    ``zeros`` [..., P, G, 16]; ``rows`` is N and ``columns`` K.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    columns: int

    @classmethod
    def of(cls, scheme: Scheme, codes: Tensor, scales: Tensor, zeros: Tensor | None, columns: int) -> QuantizedWeight:
        """From codes uint8 [..., N, padded K] and scales and zeros [..., N, G] as matrices."""
        kept = None if zeros is None else interleave(zeros.to(scheme.scale_dtype))
        return cls(
            scheme, pack(codes, scheme.bits), interleave(scales.to(scheme.scale_dtype)), kept, codes.shape[-2], columns
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own."""
        return (*self.codes.shape[:-3], self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros) if t is not None)

    @property
    def scale_matrix(self) -> Tensor:
        """Scales [..., N, G] in fp32."""
        return deinterleave(self.scales, self.rows).float()

    @property
    def zero_matrix(self) -> Tensor:
        """Zeros [..., N, G] in fp32."""
        if self.zeros is None:
            return torch.full_like(self.scale_matrix, self.scheme.middle)
        return deinterleave(self.zeros, self.rows).float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., N, K] that the codes stand for."""
        return dequantize_reference(
            self.codes, self.scales, self.zeros, self.scheme.bits, self.rows, self.columns, dtype
        )


def interleave(matrix: Tensor) -> Tensor:
    """[..., N, G] to [..., P, G, 16], rows padded with zeros."""
    padding = -matrix.shape[-2] % LANES
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, padding))
    return padded.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def deinterleave(lanes: Tensor, rows: int) -> Tensor:
    """[..., P, G, 16] to [..., N, G]; the inverse of `interleave`."""
    return lanes.transpose(-1, -2).flatten(-3, -2)[..., :rows, :]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., N, C], C a multiple of 32, to bytes [..., P, words, 64]; the inverse of `unpack`."""
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % LANES))
    if bits == 4:
        low, high = padded.unflatten(-1, (-1, 2, WORD)).unbind(-2)
        padded = (low | (high << 4)).flatten(-2)
    words = padded.unflatten(-1, (-1, WORD)).unflatten(-3, (-1, LANES))  # [..., P, lane, word, byte]
    return words.transpose(-3, -2).flatten(-2).contiguous()


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Bytes [..., P, words, 64] to codes uint8 [..., N, C]."""
    by_row = packed.unflatten(-1, (LANES, WORD)).transpose(-3, -2).flatten(-4, -3)[..., :rows, :, :]
    if bits == 4:
        by_row = torch.stack([by_row & 15, by_row >> 4], dim=-2)
        return by_row.flatten(-3)
    return by_row.flatten(-2)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> QuantizedWeight:
    """The nearest codes of weight [..., N, K] for given scales and zeros [..., N, G], which are stored as they are."""
    grouped = by_group(weight.float(), scheme)
    scales = scales.to(scheme.scale_dtype)
    zeros = None if zeros is None else zeros.to(scheme.scale_dtype)
    codes = nearest(grouped, scales.float(), None if zeros is None else zeros.float(), scheme)
    return QuantizedWeight.of(scheme, codes.to(torch.uint8).flatten(-2), scales, zeros, weight.shape[-1])


def nearest(grouped: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest codes (as floats) of groups [..., G, group] for scales and zeros [..., G]; the zero where the scale
    is zero.
    """
    inverse = torch.where(scales == 0, 0.0, 1.0 / torch.where(scales == 0, 1.0, scales))[..., None]
    middle = float(scheme.middle) if zeros is None else zeros[..., None]
    return (grouped * inverse).add_(middle).round_().clamp_(0, scheme.levels - 1)


def by_group(weight: Tensor, scheme: Scheme) -> Tensor:
    """Weight [..., N, K] as groups [..., N, G, group], padded with zeros."""
    columns = weight.shape[-1]
    weight = torch.nn.functional.pad(weight, (0, scheme.padded(columns) - columns))
    return weight.unflatten(-1, (scheme.groups(columns), -1))


def dequantize_reference(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The specification of `dequantize`: (code - zero) * scale in fp32, then rounded to `dtype`."""
    scale = deinterleave(scales, rows).float()[..., None]
    zero = float(1 << (bits - 1)) if zeros is None else deinterleave(zeros, rows).float()[..., None]
    values = unpack(codes, bits, rows).unflatten(-1, (scale.shape[-2], -1)).float()
    return ((values - zero) * scale).flatten(-2)[..., :columns].to(dtype).contiguous()
