"""Activation-aware scaling (Lin et al., AWQ, 2023): columns that large inputs meet are kept more exactly.

Column k of the weights that read one norm is multiplied by s[k], the norm's own weight is divided by it: the product is
the same, but rounding errors in that column count less. s = (mean |x|)^alpha, with the alpha in [0, 1] that makes the
least error of the products on the calibration's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelc.ir.quantized import Scheme
from accelc.ir.rounding import round_to_nearest

STEPS = 10
"""Exponents that are tried besides 0, which leaves everything as it is."""
ROWS = 256
"""Rows of the inputs that an exponent is judged by."""


def search_scales(
    pieces: Sequence[Tensor], weights: Sequence[Tensor], schemes: Sequence[Scheme]
) -> tuple[Tensor, float, float]:
    """Scales [K] for weights [N, K] that read the rows [M, K] of all pieces; with the squared errors of the products
    without and with them.

    Errors are means over rows of the sum over all outputs.
    """
    rows = sum(map(len, pieces))
    size = (sum(piece.float().abs().sum(0) for piece in pieces) / rows).clamp(min=1e-6)  # type: ignore[union-attr]
    step_between = max(1, -(-rows // ROWS))
    sample = torch.cat([piece[::step_between] for piece in pieces]).float()
    best, first, least = torch.ones_like(size), 0.0, float("inf")
    for step in range(STEPS + 1):
        scales = size.pow(step / STEPS)
        scales = (scales / (scales.amax() * scales.amin()).sqrt()).clamp(1e-4, 1e4)
        error = sum(_error(sample, weight, scheme, scales) for weight, scheme in zip(weights, schemes, strict=True))
        if step == 0:
            first = error
        if error < least:
            best, least = scales, error
    return best, first, least


def _error(x: Tensor, weight: Tensor, scheme: Scheme, scales: Tensor) -> float:
    exact = weight.float()
    made = round_to_nearest(exact * scales, scheme, clip=False).dequantize() / scales
    return float((x @ (made - exact).T).square().sum(-1).mean())
