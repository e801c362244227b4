"""Half-quadratic quantization (Badri and Shaji, HQQ, 2023): data-free, robust to outliers.

The error is measured by a norm with p < 1, which forgives a few large errors. It is split by an auxiliary variable e:
alternately e takes up the outliers of the error (a shrinkage, Chartrand's generalised soft threshold) and the zeros,
or, in symmetric schemes, the scales, are solved for in closed form against what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelc.ir.quantized import QuantizedWeight, Scheme, by_group, encode, nearest
from accelc.ir.rounding import full_range

NORM, BETA, GROWTH = 0.7, 10.0, 1.01
"""The constants of the authors: the norm's p, the first penalty and its factor from one iteration to the next."""


def half_quadratic(weight: Tensor, scheme: Scheme, *, iterations: int = 20) -> QuantizedWeight:
    """Quantize weight [..., N, K]; stops early when the mean absolute error of the whole matrix grows."""
    grouped = by_group(weight.float(), scheme)
    scale, zero = full_range(grouped, scheme)
    best, least, beta = (scale, zero), float("inf"), BETA
    for _ in range(iterations + 1):
        stored = scale.to(scheme.scale_dtype).float()
        kept = None if zero is None else zero.to(scheme.scale_dtype).float()
        codes = nearest(grouped, stored, kept, scheme)
        offset = float(scheme.middle) if kept is None else kept[..., None]
        error = grouped - (codes - offset) * stored[..., None]
        mean = float(error.abs().mean())
        if mean >= least:
            break
        best, least = (scale, zero), mean
        outliers = _shrink(error, beta)
        if zero is None:
            q = codes - scheme.middle
            square = (q * q).sum(-1)
            fitted = (q * (grouped - outliers)).sum(-1) / square.clamp(min=1e-30)
            scale = torch.where((square > 0) & (fitted != 0), fitted, scale)
        else:
            step = torch.where(stored == 0, 1.0, stored)[..., None]
            zero = (codes - (grouped - outliers) / step).mean(-1)
        beta *= GROWTH
    return encode(weight, *best, scheme)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """What of the error the auxiliary variable takes up: sign(x) * relu(|x| - |x|^(p - 1) / beta)."""
    size = error.abs()
    return error.sign() * torch.relu(size - size.clamp(min=1e-12).pow(NORM - 1) / beta)
