"""Sizes of dims as polynomials in the batch B and the length T, read off symbolic shapes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx

from accelc.ir.errors import DeriveError, describe


@dataclass(frozen=True)
class Size:
    """const + batch * B + time * T + rows * B * T."""

    const: int = 0
    batch: int = 0
    time: int = 0
    rows: int = 0

    @property
    def has_time(self) -> bool:
        """Whether the dim runs along the sequence, alone or merged with the batch."""
        return self.time != 0 or self.rows != 0

    @property
    def is_time(self) -> bool:
        """Exactly T: the sequence dim itself."""
        return self == Size(time=1)

    @property
    def is_batch(self) -> bool:
        """Exactly B."""
        return self == Size(batch=1)

    @property
    def is_const(self) -> bool:
        return not (self.batch or self.time or self.rows)


@dataclass(frozen=True)
class Symbols:
    """The symbols that stand for batch and length in the captured graph, and the longest length there is."""

    batch: sympy.Symbol
    length: sympy.Symbol
    max_length: int

    @staticmethod
    def of(tokens: fx.Node, max_length: int) -> Symbols:
        """Read off an input [B, T, ...]."""
        b, t = tokens.meta["val"].shape[:2]
        if isinstance(b, int) or isinstance(t, int):
            raise DeriveError(f"the captured graph is specialised to tokens {[b, t]}", where=describe(tokens))
        return Symbols(b.node.expr, t.node.expr, max_length)

    def size(self, value: int | torch.SymInt | sympy.Expr) -> Size | None:
        """The polynomial of a size, or None when it has another form (or depends on data).

        Forms such as Max(0, T) are fitted at a few points and verified at others up to the longest length. One that
        changes on the way, such as Min(T, 2048), is read off the longest lengths: the logits of a token do not depend
        on how far the sequence goes on, so the step may compute all of them as if it went on long.
        """
        if isinstance(value, int):
            return Size(const=value)
        expr = value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)
        if expr.free_symbols - {self.batch, self.length}:
            return None
        return _fit(self, expr)


@functools.lru_cache(maxsize=4096)
def _fit(symbols: Symbols, expr: sympy.Expr) -> Size | None:
    """The polynomial that holds for all lengths, else the one that holds for the longest eighth of them, else None."""
    most = max(symbols.max_length, 3)
    if expr.is_polynomial(symbols.batch, symbols.length):
        return _through(symbols, expr, [2, 7, 11])
    everywhere = {2, 5, 7, 11, 17, 29, *(1 << k for k in range(6, 24, 2)), most - 1}
    longest = {most * 7 // 8, most * 15 // 16, *range(most - 4, most)}
    return _through(symbols, expr, [*sorted(n for n in everywhere if n < most), most]) or _through(
        symbols, expr, [*sorted(n for n in longest if n > 1), most]
    )


def _through(symbols: Symbols, expr: sympy.Expr, lengths: list[int]) -> Size | None:
    """const + batch*b + time*t + rows*b*t through the values at these lengths and at several batches, if there is one.

    Solved from the first and the last length at two batches, and verified at all lengths at two others.
    """

    def at(b: int, t: int) -> int:
        return int(expr.subs({symbols.batch: b, symbols.length: t}))

    low, high = lengths[0], lengths[-1]
    c00, c10, c01, c11 = at(2, low), at(3, low), at(2, high), at(3, high)
    span = high - low
    rows, rest = divmod((c11 - c01) - (c10 - c00), span)
    if rest:
        return None
    batch = (c10 - c00) - rows * low
    time, rest = divmod(c01 - c00 - rows * 2 * span, span)
    if rest:
        return None
    const = c00 - 2 * batch - time * low - rows * 2 * low
    for t in lengths:
        for b in (4, 7):
            if at(b, t) != const + batch * b + time * t + rows * b * t:
                return None
    return Size(const, batch, time, rows)


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Symbolic shape of a node's value; of the first element for nodes with several results."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    if not isinstance(value, torch.Tensor):
        raise DeriveError(f"{node.name} has no tensor shape", where=describe(node))
    return tuple(value.shape)
