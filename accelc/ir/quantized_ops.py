"""The operations that read weights in few bits (`accelc.ir.quantized`), each with the reference that specifies it."""

from __future__ import annotations

import torch
from torch import Tensor

from accelc.ir.quantized import LANES, WORD, dequantize_reference


@torch.library.custom_op("accelc::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight [..., N, K] of a `QuantizedWeight` for operations that have no kernel for codes."""
    return dequantize_reference(codes, scales, zeros, bits, rows, columns, dtype)


@dequantize.register_fake
def _(codes, scales, zeros, bits, rows, columns, dtype):
    return codes.new_empty((*codes.shape[:-3], rows, columns), dtype=dtype)


@torch.library.custom_op("accelc::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, rows: int
) -> Tensor:
    """x [..., K] times the transpose of a quantized weight [N, K], plus bias [N]: [..., N] in x's dtype.

    Products are summed in fp32 from weights that are not rounded to x's dtype first.
    """
    return quantized_linear_reference(x, codes, scales, zeros, bias, bits, rows)


def quantized_linear_reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, rows: int
) -> Tensor:
    """The specification of `quantized_linear`."""
    weight = dequantize_reference(codes, scales, zeros, bits, rows, x.shape[-1], torch.float32)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


@quantized_linear.register_fake
def _(x, codes, scales, zeros, bias, bits, rows):
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("accelc::quantized_embedding", mutates_args=())
def quantized_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` [...] of a quantized table [N, K]: [..., K] in `dtype`, K = `columns`."""
    return quantized_embedding_reference(ids, codes, scales, zeros, bits, columns, dtype)


def quantized_embedding_reference(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The specification of `quantized_embedding`."""
    part, lane = ids // LANES, ids % LANES
    words = codes.unflatten(-1, (LANES, WORD))[part, :, lane].unsqueeze(-3)  # [..., 1, words, 4]
    by_row = torch.stack([words & 15, words >> 4], dim=-2).flatten(-3) if bits == 4 else words.flatten(-2)
    scale = scales[part, :, lane].float()[..., None]
    zero = float(1 << (bits - 1)) if zeros is None else zeros[part, :, lane].float()[..., None]
    values = by_row.squeeze(-2).unflatten(-1, (scale.shape[-2], -1)).float()
    return ((values - zero) * scale).flatten(-2)[..., :columns].to(dtype).contiguous()


@quantized_embedding.register_fake
def _(ids, codes, scales, zeros, bits, columns, dtype):
    return codes.new_empty((*ids.shape, columns), dtype=dtype)


@torch.library.custom_op("accelc::quantized_grouped_linear", mutates_args=())
def quantized_grouped_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, ends: Tensor, bits: int, rows: int
) -> Tensor:
    """Rows x [R, K], sorted by expert, times the transpose of each one's quantized weight, of a stack [E, N, K].

    ``ends`` int [E]: expert e has the rows from ends[e - 1] (0 for the first) to ends[e]; rows beyond the last end give
    zeros. Returns [R, N] in x's dtype.
    """
    return quantized_grouped_linear_reference(x, codes, scales, zeros, ends, bits, rows)


def quantized_grouped_linear_reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, ends: Tensor, bits: int, rows: int
) -> Tensor:
    """The specification of `quantized_grouped_linear`."""
    result = x.new_zeros((len(x), rows))
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            own = None if zeros is None else zeros[expert]
            result[begin:end] = quantized_linear(x[begin:end], codes[expert], scales[expert], own, None, bits, rows)
        begin = max(begin, end)
    return result


@quantized_grouped_linear.register_fake
def _(x, codes, scales, zeros, ends, bits, rows):
    return x.new_empty((x.shape[0], rows))
