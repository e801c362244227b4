"""Groups chosen matrix by matrix from the weights alone (the idea of FineQuant, Kim et al. 2023).

Matrices differ in how much a finer scale helps them: outliers in some make a group of 128 lose much, others hardly need
any groups. Every group size is tried on every matrix; bits are then given to those that gain most, so that all together
take no more than with a group of 128 everywhere. FineQuant halves the group where a matrix' ranges demand it; this
chooses by the error itself, and can take bits away too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from accelc.ir.quantized import GROUPS, LANES, QuantizedWeight, Scheme

BASE = 128
"""The group whose bits are the budget."""
CANDIDATES = tuple(sorted((g for g in GROUPS if g), reverse=True))
"""From the fewest bits to the most."""


@dataclass(frozen=True)
class Option:
    """A matrix in one scheme: ``bits`` that it takes, and what it loses, in any unit that adds up."""

    scheme: Scheme
    bits: float
    loss: float


def relative_error(weight: Tensor, made: QuantizedWeight) -> float:
    """The squared error of a quantized weight, as a share of its squares: the noise of the products with it."""
    exact = weight.float()
    size = float(exact.square().sum())
    return float((made.dequantize() - exact).square().sum()) / size if size > 0 else 0.0


def spend(options: Mapping[str, list[Option]], budget: float) -> dict[str, Option]:
    """One option for each name, so that bits add up to at most `budget` and the loss is least.

    Starts from the cheapest everywhere and takes steps along each lower convex hull, best loss for a bit first, as long
    as they fit: the multiple-choice knapsack's usual solution, at most one step from the optimum. A budget that even
    the cheapest exceed is not met.
    """
    hulls = {name: _hull(each) for name, each in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bits for hull in hulls.values())
    steps = [(_slope(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        hull, at = hulls[name], chosen[name]
        price = hull[at + 1].bits - hull[at].bits
        if price > left:
            continue
        left -= price
        chosen[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (_slope(hull, at + 1), name))
    return {name: hulls[name][at] for name, at in chosen.items()}


def _hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bits, from the cheapest on."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], option) <= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(a: Option, b: Option) -> float:
    """Loss for a bit on the way from a to b; more negative is better."""
    return (b.loss - a.loss) / (b.bits - a.bits)


def _slope(hull: list[Option], at: int) -> float:
    return _gain(hull[at], hull[at + 1])


def candidates(scheme: Scheme) -> list[Scheme]:
    """The same scheme in every group size."""
    return [replace(scheme, group=group) for group in CANDIDATES]


def bits_of(scheme: Scheme, shape: tuple[int, ...]) -> float:
    """Bits that a matrix [..., N, K] takes, its rows padded to whole lanes."""
    *outer, rows, columns = shape
    return scheme.bits_per_weight(columns) * columns * math.prod(outer) * (-(-rows // LANES) * LANES)


def choose_groups(errors: Mapping[str, list[Option]], base: Mapping[str, float]) -> dict[str, Scheme]:
    """The scheme of each matrix; `base`: the bits each takes with a group of 128."""
    return {name: option.scheme for name, option in spend(errors, sum(base.values())).items()}
