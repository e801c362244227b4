"""GPTQ (Frantar et al. 2022): each column's rounding error is made good by the columns that are not yet rounded.

The Hessian of a linear's squared output error is that of its inputs, H = mean(x x^T) over calibration text. Columns
are rounded one after another; the error of each, weighted by the inverse Hessian of the columns left, is taken from
these. Columns can be visited in the order of their diagonal (largest first), which helps most at few bits; the groups
stay those of the stored order, and their scales are then fixed before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accelc.ir.errors import InputError
from accelc.ir.quantized import QuantizedWeight, Scheme, by_group, pack
from accelc.ir.rounding import round_to_nearest

BLOCK = 128
"""Columns whose corrections are gathered before the rest of the matrix is corrected."""


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, damping: float = 0.01, by_importance: bool = True
) -> QuantizedWeight:
    """Quantize weight [N, K] for inputs of second moment `hessian` [K, K].

    `damping`: share of the mean diagonal added to it. Inputs that are always zero get their weights rounded as they
    are. Raises InputError when the Hessian does not fit or is not finite.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise InputError(f"the Hessian of a weight {list(weight.shape)} is {list(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise InputError("the Hessian holds values that are not finite", remedy="Look for NaN in the calibration run.")
    hessian = hessian.float().clone()
    work = weight.float().clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0
    importance = hessian.diagonal().clone()
    made = round_to_nearest(weight, scheme, importance=importance)
    per_group = scheme.padded(columns) // scheme.groups(columns)
    scale, zero = (m.repeat_interleave(per_group, -1)[:, :columns] for m in (made.scale_matrix, made.zero_matrix))
    order = torch.argsort(importance, descending=True) if by_importance else torch.arange(columns)
    work, scale, zero = work[:, order], scale[:, order], zero[:, order]
    upper = _inverse_factor(hessian[order][:, order], damping)
    codes = torch.empty(rows, columns, dtype=torch.float32)
    step = torch.where(scale == 0, 1.0, scale)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = torch.zeros(rows, end - begin, dtype=torch.float32)
        for i in range(begin, end):
            column = work[:, i]
            code = (column / step[:, i] + zero[:, i]).round_().clamp_(0, scheme.levels - 1)
            codes[:, i] = code
            error = (column - (code - zero[:, i]) * scale[:, i]) / upper[i, i]
            work[:, i:end] -= error[:, None] * upper[i, i:end][None, :]
            errors[:, i - begin] = error
        work[:, end:] -= errors @ upper[begin:end, end:]
    stored = torch.empty_like(codes)
    stored[:, order] = codes
    padded = by_group(stored, scheme).flatten(-2).to(torch.uint8)
    return replace(made, codes=pack(padded, scheme.bits))


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian; damped further where it is not positive."""
    mean = float(hessian.diagonal().mean())
    share = damping
    while True:
        damped = hessian.double() + torch.eye(len(hessian), dtype=torch.float64) * (share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0:
                return upper.float()
        share *= 10
        if share > 1e6:
            raise InputError(
                "the Hessian cannot be made positive", remedy="Calibrate with more, and more varied, text."
            )
