"""Pointwise arithmetic as a polynomial: proves that two spellings of one formula are the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch.fx as fx

from accelc.passes.match import argument, aten, is_call, is_cast, number

Polynomial = dict[tuple[int, int], float]
"""Coefficients by the powers of two unknowns."""

ARITHMETIC = (aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten.pow, aten.square)
MAX_POWER = 4
REACH = 6
"""How many operations away from its middle function the ends of a formula are looked for."""


def polynomial(value: Any, unknowns: Mapping[fx.Node, tuple[int, int]]) -> Polynomial | None:
    """What `value` computes from `unknowns` (given as powers, (1, 0) or (0, 1)), or None when it needs anything else.

    Conversions between floating-point types are looked through: they change a value by rounding only.
    """
    if isinstance(value, fx.Node) and value in unknowns:
        return {unknowns[value]: 1.0}
    constant = number(value)
    if constant is not None:
        return {(0, 0): constant} if constant else {}
    if is_cast(value):
        return polynomial(value.args[0], unknowns)
    if not is_call(value, *ARITHMETIC):
        return None
    left = polynomial(value.args[0], unknowns)
    if left is None:
        return None
    if is_call(value, aten.neg):
        return _product(left, {(0, 0): -1.0})
    if is_call(value, aten.square, aten.pow):
        power = 2.0 if is_call(value, aten.square) else number(value.args[1])
        return _power(left, power)
    right = polynomial(value.args[1], unknowns)
    if right is None:
        return None
    if is_call(value, aten.mul):
        return _product(left, right)
    if is_call(value, aten.div):
        divisor = right.get((0, 0), 0.0)
        plain = len(right) == 1 and divisor and len(value.args) == 2 and not value.kwargs
        return _product(left, {(0, 0): 1 / divisor}) if plain else None
    alpha = number(argument(value, "alpha"))
    if alpha is None:
        return None
    return _sum(left, _product(right, {(0, 0): alpha if is_call(value, aten.add) else -alpha}))


def close(p: Polynomial | None, q: Polynomial, tolerance: float = 1e-4) -> bool:
    """Whether two polynomials have the same coefficients but for how many digits of a constant were written down."""
    return p is not None and p.keys() == q.keys() and all(math.isclose(p[k], q[k], rel_tol=tolerance) for k in q)


def arithmetic_inputs(value: Any, reach: int = REACH) -> list[fx.Node]:
    """`value` and the nodes it is computed from by arithmetic, nearest first: what a formula's unknown may be."""
    found: list[fx.Node] = []
    front = [value]
    for _ in range(reach):
        nodes = [n for n in front if isinstance(n, fx.Node) and n not in found and number(n) is None]
        found += list(dict.fromkeys(nodes))
        front = [a for n in nodes if is_call(n, *ARITHMETIC) or is_cast(n) for a in n.args]
    return found


def arithmetic_users(node: fx.Node, reach: int = REACH) -> Iterator[fx.Node]:
    """Nodes computed from `node` by arithmetic, nearest first."""
    front = [node]
    for _ in range(reach):
        front = list(dict.fromkeys(u for n in front for u in n.users if is_call(u, *ARITHMETIC) or is_cast(u)))
        yield from front


def _sum(p: Polynomial, q: Polynomial) -> Polynomial:
    total = {k: p.get(k, 0.0) + q.get(k, 0.0) for k in {**p, **q}}
    return {k: c for k, c in total.items() if c}


def _product(p: Polynomial, q: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for (i, j), a in p.items():
        for (k, m), b in q.items():
            total = _sum(total, {(i + k, j + m): a * b})
    return total


def _power(p: Polynomial, power: float | None) -> Polynomial | None:
    if power is None or power not in range(1, MAX_POWER + 1):
        return None
    result: Polynomial = {(0, 0): 1.0}
    for _ in range(int(power)):
        result = _product(result, p)
    return result
