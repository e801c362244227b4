"""Numeric comparison of two programs on real inputs: outputs by name, and the states they leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir import Program

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest error allowed by default, relative to the largest magnitude of the reference, by its dtype; others: equal."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference: the largest absolute error, and that over the largest magnitude."""

    name: str
    absolute: float
    relative: float
    tolerance: float
    problem: str = ""
    """Set where numbers cannot be compared: another shape, another dtype, non-finite in one of the two only."""

    @property
    def passed(self) -> bool:
        """Whether the relative error lies within the tolerance."""
        return not self.problem and self.relative <= self.tolerance

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        return f"{self.name}: max abs error {self.absolute:.2e}, relative {self.relative:.2e}"


def comparable(before: Program, after: Program) -> str:
    """Empty when the programs can be compared on one set of inputs, else the reason why not."""
    if before.inputs != after.inputs:
        return f"the inputs changed from {before.inputs} to {after.inputs}"
    if before.states != after.states:
        return f"the states changed from {[s.name for s in before.states]} to {[s.name for s in after.states]}"
    if not set(before.outputs) & set(after.outputs):
        return f"no output name in common: {before.outputs} and {after.outputs}"
    return ""


def execute(program: Program, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs by name, and states by name as the run left them; `inputs` (inputs, then states) are not modified."""
    arguments = [t.clone() for t in inputs]
    results = dict(zip(program.outputs, program.run(*arguments)))
    states = arguments[len(program.inputs) :]
    return results | {f"state {spec.name}": t for spec, t in zip(program.states, states)}


def compare(
    before: Program, after: Program, inputs: Sequence[Tensor], tolerance: float | None = None
) -> tuple[Difference, ...]:
    """The differences of `after` from `before` in every output and state they share.

    `tolerance` is relative to the largest magnitude of the reference; None takes `TOLERANCES` by dtype. Raises
    ValueError when `comparable` says that they cannot be compared.
    """
    if reason := comparable(before, after):
        raise ValueError(reason)
    reference, results = execute(before, inputs), execute(after, inputs)
    return tuple(difference(n, results[n], r, tolerance) for n, r in reference.items() if n in results)


def difference(name: str, result: Tensor, reference: Tensor, tolerance: float | None = None) -> Difference:
    """How far `result` is from `reference`; non-finite entries have to be the same in both."""
    limit = TOLERANCES.get(reference.dtype, 0.0) if tolerance is None else tolerance
    nothing = float("nan")
    if result.shape != reference.shape:
        return Difference(name, nothing, nothing, limit, f"shape {list(result.shape)}, was {list(reference.shape)}")
    if result.dtype != reference.dtype:
        return Difference(name, nothing, nothing, limit, f"dtype {result.dtype}, was {reference.dtype}")
    a, b = result.detach().double(), reference.detach().double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(
        a[~finite].nan_to_num(0.0, 1.0, -1.0), b[~finite].nan_to_num(0.0, 1.0, -1.0)
    ):
        return Difference(name, nothing, nothing, limit, "not the same entries are infinite or NaN")
    if not finite.any():
        return Difference(name, 0.0, 0.0, limit)
    absolute = (a - b)[finite].abs().max().item()
    magnitude = b[finite].abs().max().item()
    return Difference(name, absolute, absolute / magnitude if magnitude else absolute, limit)
