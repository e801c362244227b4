"""Round to nearest, with a search for the range that loses least: needs no data, and seconds for a large model.

For each group the range is shrunk step by step; what lies outside is clipped. For the codes of each range the scale of
least squared error has a closed form, `sum(w q) / sum(q q)`, as used by llama.cpp's formats; asymmetric groups refit
scale and zero by linear regression of the weights on their codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from accelc.ir.errors import InputError
from accelc.ir.quantized import LANES, QuantizedWeight, Scheme, by_group, nearest

CHUNK = 1 << 18
"""Weights that are worked on at a time: their intermediate values stay in the second-level cache."""
SHRINK = {4: (1.0, 0.92, 0.85, 0.78, 0.7), 8: (1.0,)}
"""Parts of the full range that are tried, by bits; with 256 codes clipping never pays on its own."""


def round_to_nearest(
    weight: Tensor, scheme: Scheme, *, clip: bool = True, importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantize weight [..., N, K] (floating point, finite).

    `clip`: search the range of each group; else the full range is kept and every weight is within half a step of its
    value. `importance` [K], positive: how much a squared error in each column counts (the mean square of the inputs).
    Raises InputError for another rank or dtype, and for a weight without elements.
    """
    if weight.ndim < 2 or not weight.numel() or not weight.is_floating_point():
        found = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise InputError(f"a weight to quantize is {found}", remedy="Give floating-point matrices [..., N, K].")
    codes, scales, zeros = round_weight(
        weight, scheme.bits, scheme.group, scheme.symmetric, scheme.scale_dtype,
        list(SHRINK[scheme.bits]) if clip else [], importance,
    )  # fmt: skip
    kept = None if scheme.symmetric else zeros
    return QuantizedWeight(scheme, codes, scales, kept, weight.shape[-2], weight.shape[-1])


def all_finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite. (`isfinite().all()` takes 30 times as long in bf16.)"""
    return not weight.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight))


def check_finite(name: str, weight: Tensor, scheme: Scheme) -> None:
    """Raise InputError for a weight with values that no code can stand for, or too large for the scheme's scales."""
    if not weight.numel():
        return
    largest = max(abs(float(extreme)) for extreme in torch.aminmax(weight))  # NaN passes on
    if not largest < math.inf:
        raise InputError(f"the weight {name} holds NaN or infinite values", remedy="Repair the checkpoint.")
    if largest / scheme.middle > torch.finfo(scheme.scale_dtype).max:
        raise _too_large(name, scheme.scale_dtype)


def check_scales(name: str, made: QuantizedWeight) -> None:
    """Raise InputError for a quantized weight whose scales or zeros are not finite in the scheme's dtype."""
    if not all(all_finite(part) for part in (made.scales, made.zeros) if part is not None):
        raise _too_large(name, made.scales.dtype)


def _too_large(name: str, dtype: torch.dtype) -> InputError:
    return InputError(
        f"the weight {name} is too large for scales in {str(dtype).removeprefix('torch.')}",
        remedy="Take scales in bf16 or fp32: int4:fp32." if dtype == torch.float16 else "Repair the checkpoint.",
    )


@torch.library.custom_op("accelc::round_weight", mutates_args=())
def round_weight(
    weight: Tensor, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype, shrink: Sequence[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, scales and zeros of a weight [..., N, K] in the layout of `QuantizedWeight`; symmetric: zeros [0].

    ``shrink``: parts of the full range to try; none: keep it, and round scales so that nothing is clipped.
    """
    return round_weight_reference(weight, bits, group, symmetric, scale_dtype, shrink, importance)


def empty_codes(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """What `round_weight` returns, not filled in."""
    *outer, rows, columns = weight.shape
    blocks = (rows + LANES - 1) // LANES
    codes = weight.new_empty((*outer, blocks, scheme.padded(columns) * scheme.bits // 32, 64), dtype=torch.uint8)
    scales = weight.new_empty((*outer, blocks, scheme.groups(columns), LANES), dtype=scheme.scale_dtype)
    return codes, scales, scales.new_empty(0) if scheme.symmetric else torch.empty_like(scales)


@round_weight.register_fake
def _(weight, bits, group, symmetric, scale_dtype, shrink, importance):
    return empty_codes(weight, Scheme(bits, group, symmetric, scale_dtype))


def round_weight_reference(
    weight: Tensor, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype, shrink: Sequence[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The specification of `round_weight`."""
    scheme = Scheme(bits, group, symmetric, scale_dtype)
    *outer, columns = weight.shape
    rows = weight.reshape(-1, columns)
    per_chunk = max(1, CHUNK // max(columns, 1))
    counts = None if importance is None else by_group(importance.float()[None], scheme)
    parts = [_round(rows[at : at + per_chunk], scheme, shrink, counts) for at in range(0, len(rows), per_chunk)]
    codes, scales = (torch.cat([p[i] for p in parts]).unflatten(0, outer) for i in (0, 1))
    zeros = None if symmetric else torch.cat([p[2] for p in parts]).unflatten(0, outer)
    made = QuantizedWeight.of(scheme, codes, scales, zeros, columns)
    return made.codes, made.scales, made.scales.new_empty(0) if made.zeros is None else made.zeros


def full_range(grouped: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros [..., G] with which no weight of the groups [..., G, group] is clipped."""
    low, high = grouped.amin(-1).clamp_(max=0.0), grouped.amax(-1).clamp_(min=0.0)
    if scheme.symmetric:
        # The side with one code more belongs to the larger extreme: the scale has its sign turned for that.
        extreme = torch.where(-low >= high, low, high)
        other = torch.where(-low >= high, high, -low)
        scale = torch.maximum(extreme.abs() / scheme.middle, other / (scheme.middle - 1))
        return torch.where(-low >= high, scale, -scale), None
    scale = (high - low) / (scheme.levels - 1)
    zero = torch.where(scale > 0, -low / torch.where(scale > 0, scale, 1.0), 0.0)
    return scale, zero.round_()


def _round(
    rows: Tensor, scheme: Scheme, shrink: Sequence[float], counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, padded K], scales and zeros [R, G] (none: empty) of some rows [R, K]."""
    grouped = by_group(rows.float(), scheme)
    scale, zero = full_range(grouped, scheme)
    if not shrink:
        scale = _away_from_zero(scale, scheme.scale_dtype)
        zero = torch.empty(0) if zero is None else zero.to(scheme.scale_dtype)
        kept = None if scheme.symmetric else zero.float()
        return nearest(grouped, scale.float(), kept, scheme).to(torch.uint8).flatten(-2), scale, zero
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    least: Tensor | None = None
    for codes, scales, zeros in _candidates(grouped, scheme, scale, zero, shrink, counts):
        error = _error(grouped, codes, scales, zeros, scheme, counts)
        if best is None or least is None:
            best, least = (codes, scales, zeros), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        kept = None if zeros is None or best[2] is None else torch.where(better, zeros, best[2])
        best = (torch.where(better[..., None], codes, best[0]), torch.where(better, scales, best[1]), kept)
    assert best is not None
    return best[0].to(torch.uint8).flatten(-2), best[1], torch.empty(0) if best[2] is None else best[2]


def _away_from_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype` so that no range shrinks: of 256 codes half a step would be cut off."""
    rounded = scale.to(dtype)
    further = torch.nextafter(rounded, torch.copysign(torch.full_like(rounded, torch.inf), rounded))
    return torch.where(rounded.float().abs() < scale.abs(), further, rounded)


def _candidates(
    grouped: Tensor,
    scheme: Scheme,
    scale: Tensor,
    zero: Tensor | None,
    shrink: Sequence[float],
    counts: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Codes (float, [R, G, group]), stored scales and zeros for each range."""
    if scheme.bits == 8:  # a refitted scale may lose more by its own rounding
        scales = _away_from_zero(scale, scheme.scale_dtype)
        zeros = None if zero is None else zero.to(scheme.scale_dtype)
        yield nearest(grouped, scales.float(), zero, scheme), scales, zeros
    for part in shrink:
        codes = nearest(grouped, scale * part, zero, scheme)
        scales, zeros = _refit(grouped, codes, scale * part, zero, scheme, counts)
        scales = scales.to(scheme.scale_dtype)
        zeros = None if zeros is None else zeros.to(scheme.scale_dtype)
        yield nearest(grouped, scales.float(), None if zeros is None else zeros.float(), scheme), scales, zeros


def _refit(
    grouped: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, counts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The scales and zeros of least squared error for given codes; where they are not determined, as they were."""
    if zero is None:
        q = codes - scheme.middle
        weighted = q if counts is None else q * counts
        square = (weighted * q).sum(-1)
        return torch.where(square > 0, (weighted * grouped).sum(-1) / square.clamp(min=1e-30), scale), None
    total = float(codes.shape[-1]) if counts is None else counts.sum(-1).clamp(min=1e-30)
    counted = (lambda t: t.sum(-1)) if counts is None else (lambda t: (t * counts).sum(-1))
    mean_q, mean_w = counted(codes) / total, counted(grouped) / total
    centred = codes - mean_q[..., None]
    square = counted(centred * centred)
    slope = counted(centred * grouped) / square.clamp(min=1e-30)
    determined = (square > 1e-6) & (slope != 0)
    scales = torch.where(determined, slope, scale)
    offset = mean_q - mean_w / torch.where(scales == 0, 1.0, scales)
    return scales, torch.where(determined, offset, zero)


def _error(
    grouped: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, counts: Tensor | None
) -> Tensor:
    """Squared error of each group [R, G]."""
    middle = float(scheme.middle) if zeros is None else zeros.float()[..., None]
    difference = (codes - middle).mul_(scales.float()[..., None]).sub_(grouped)
    if counts is not None:
        return (difference * difference * counts).sum(-1)
    return difference.square_().sum(-1)
