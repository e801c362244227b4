"""How far the logits of two ways to compute the same may differ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import NonFiniteLogitsError
from accelc.ir.rounding import all_finite

TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of logits, as a share of their spread, by the dtype the model computes in. In half precision some
models amplify rounding beyond it (a router that picks another expert); `allowed` then takes their noise for a bound."""

NOISE_FACTOR, MOST = 4.0, 0.4
"""How many times its own rounding noise a half-precision model may differ, and the most that is ever allowed."""


NEVER = -1e30
"""Stands for -inf, the logit of a token that a model never wants, so that two of them differ by nothing."""


def comparable(logits: Tensor) -> Tensor:
    """Logits as fp32, or fp64 where they are: exact, and so is the difference of neighbours."""
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return logits.clamp(min=NEVER) if logits.numel() and logits.amin() < NEVER else logits


def has_peaks(logits: Tensor) -> bool:
    """Whether every row of logits [..., V] has a largest one: no NaN, no +inf, not -inf alone."""
    return bool(logits.amax(dim=-1).isfinite().all())


def what_is_not_finite(tensors: Mapping[str, Tensor]) -> NonFiniteLogitsError:
    """The error for a model, of these tensors, whose logits have no peaks."""
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not all_finite(t)]
    return NonFiniteLogitsError(
        "the model itself gives NaN or infinite logits for random tokens"
        + (f"; {len(broken)} of its tensors hold such values, the first: {broken[0]}" if broken else ""),
        remedy="Check the weights; a half-precision overflow is the usual cause. No decoder was made.",
    )


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
    """The largest distance of a logit [..., V] from the mean of its row: the scale that differences are shares of.
    Logits of -inf do not count.
    """
    largest = 0.0
    for row in logits.flatten(0, -2):
        values = comparable(row)
        lowest, highest = torch.aminmax(values)
        if lowest == NEVER:
            values = values[values > NEVER]
            lowest, highest = torch.aminmax(values)
        largest = max(largest, *(float((extreme - values.mean()).abs()) for extreme in (lowest, highest)))
    return largest or 1.0
