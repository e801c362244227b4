"""How far the logits of two ways to compute the same may differ."""

from __future__ import annotations

import torch
from torch import Tensor

from accelc.ir import Program

TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of logits, as a share of their spread, by the dtype the model computes in. In half precision some
models amplify rounding beyond it (a router that picks another expert); `allowed` then takes their noise for a bound."""

NOISE_FACTOR, MOST = 4.0, 0.4
"""How many times its own rounding noise a half-precision model may differ, and the most that is ever allowed."""


def comparable(logits: Tensor) -> Tensor:
    """Logits as fp32, or fp64 where they are: exact, and so is the difference of neighbours."""
    return logits if logits.dtype is torch.float64 else logits.float()


def differences(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of logits [B, T, V] at each position: [T]; NaN where one is. One position after the other:
    with a large vocabulary a few logits are as many bytes as a layer in few bits.
    """
    return torch.stack([(comparable(a[:, t]) - comparable(b[:, t])).abs_().amax() for t in range(a.shape[1])])


def computing_dtype(step: Program) -> torch.dtype:
    """The dtype of the step's states, which is that of the values it computes with."""
    return next((s.dtype for s in step.states if s.dtype.is_floating_point), torch.float32)


def is_half(dtype: torch.dtype) -> bool:
    """Whether rounding can make a model choose otherwise, so that a fixed tolerance refuses good ones."""
    return dtype in (torch.bfloat16, torch.float16)


def allowed(dtype: torch.dtype, noise: float | None = None) -> float:
    """The largest difference, as a share of the spread; `noise` is the model's own, None where it was not measured."""
    if not is_half(dtype):
        return TOLERANCES[dtype]
    return MOST if noise is None else min(max(TOLERANCES[dtype], NOISE_FACTOR * noise), MOST)


def spread(logits: Tensor) -> float:
    """The largest distance of a logit [..., V] from the mean of its row: the scale that differences are shares of."""
    means = torch.stack([comparable(row).mean() for row in logits.flatten(0, -2)])
    lowest, highest = (comparable(extreme.flatten()) for extreme in torch.aminmax(logits, dim=-1))
    return float(torch.maximum(highest - means, means - lowest).max()) or 1.0
