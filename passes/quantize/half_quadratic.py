"""Half-quadratic quantization (Badri and Shaji, HQQ, 2023): data-free, robust to outliers.

The error is measured by a norm with p < 1, which forgives a few large errors. It is split by an auxiliary variable e:
alternately e takes up the outliers of the error (a shrinkage, Chartrand's generalised soft threshold) and the scales,
and in asymmetric schemes the zeros too, are solved for in closed form against what is left. The authors solve for zeros
alone, from the full range of each group; here the iterations begin there and at the searched range of "rtn" as well,
and each group keeps the iterate of least norm: their start alone loses to a search of ranges where groups are small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from accelc.ir.quantized import QuantizedWeight, Scheme, by_group, encode, nearest
from accelc.ir.rounding import CHUNK, full_range, round_to_nearest

NORM, BETA, GROWTH = 0.7, 10.0, 1.01
"""The constants of the authors: the norm's p, the first penalty and its factor from one iteration to the next."""


def half_quadratic(weight: Tensor, scheme: Scheme, *, iterations: int = 10) -> QuantizedWeight:
    """Quantize weight [..., N, K], in `iterations` from each start."""
    *outer, columns = weight.shape
    rows = weight.reshape(-1, columns)
    per_chunk = max(1, CHUNK // max(columns, 1))
    parts = [_solve(rows[at : at + per_chunk], scheme, iterations) for at in range(0, len(rows), per_chunk)]
    scale = torch.cat([scale for scale, _ in parts]).unflatten(0, outer)
    zeros = [zero for _, zero in parts if zero is not None]
    return encode(weight, scale, torch.cat(zeros).unflatten(0, outer) if zeros else None, scheme)


def _solve(rows: Tensor, scheme: Scheme, iterations: int) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros [R, G] of some rows [R, K]."""
    grouped = by_group(rows.float(), scheme)
    best: tuple[Tensor, Tensor | None] | None = None
    least = grouped.new_zeros(())
    for scale, zero, norm in _iterates(rows, grouped, scheme, iterations):
        if best is None:
            best, least = (scale, zero), norm
            continue
        better = norm < least
        least = torch.where(better, norm, least)
        kept = None if zero is None or best[1] is None else torch.where(better, zero, best[1])
        best = torch.where(better, scale, best[0]), kept
    assert best is not None
    return best


def _iterates(
    rows: Tensor, grouped: Tensor, scheme: Scheme, iterations: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Scales and zeros [R, G], and the norm of the error of each group: of every iteration from every start."""
    searched = round_to_nearest(rows, scheme)
    for scale, zero in (
        (searched.scale_matrix, None if scheme.symmetric else searched.zero_matrix),
        full_range(grouped, scheme),
    ):
        beta = BETA
        for _ in range(iterations + 1):
            stored = scale.to(scheme.scale_dtype).float()
            kept = None if zero is None else zero.to(scheme.scale_dtype).float()
            codes = nearest(grouped, stored, kept, scheme)
            offset = float(scheme.middle) if kept is None else kept[..., None]
            error = grouped - (codes - offset) * stored[..., None]
            yield scale, zero, error.abs().pow(NORM).sum(-1)
            scale, zero = _fitted(codes, grouped - _shrink(error, beta), scale, zero, scheme)
            beta *= GROWTH


def _fitted(
    codes: Tensor, target: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """The scales and zeros of least squared error for codes and weights [R, G, group]; where these say nothing of a
    scale, it stays.
    """
    if zero is None:
        codes = codes - scheme.middle
        square = (codes * codes).sum(-1)
        fitted = (codes * target).sum(-1) / square.clamp(min=1e-30)
        return torch.where((square > 0) & (fitted != 0), fitted, scale), None
    code, weight = codes.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
    square = (codes - code).square().sum(-1)
    fitted = ((codes - code) * (target - weight)).sum(-1) / square.clamp(min=1e-30)
    scale = torch.where((square > 0) & (fitted > 0), fitted, scale)
    return scale, (code - weight / torch.where(scale == 0, 1.0, scale)[..., None])[..., 0]


def _shrink(error: Tensor, beta: float) -> Tensor:
    """What of the error the auxiliary variable takes up: sign(x) * relu(|x| - |x|^(p - 1) / beta)."""
    size = error.abs()
    return error.sign() * torch.relu(size - size.clamp(min=1e-12).pow(NORM - 1) / beta)
