"""Muon (Jordan et al. 2024): momentum whose update of a matrix is made orthogonal, in the precision that is asked for.

torch.optim.Muon multiplies in bf16 whatever the hardware; where that is emulated, a step takes 20 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, which pushes all singular values near 1 (Jordan's, steepest at zero)."""
ITERATIONS = 5
TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """For matrices alone. ``lr`` is scaled by sqrt(max(1, rows / columns)); momentum is Nesterov's; weight decay is
    decoupled. ``dtype``: of the products that make updates orthogonal.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "dtype": dtype})
        if wrong := [list(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"Muon is for matrices, not for parameters of shape {wrong[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]), group["dtype"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
        return loss


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix with about the singular vectors of `matrix` [M, N] and all singular values near 1, in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
