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
    """The symbols that stand for batch and length in the captured graph."""

    batch: sympy.Symbol
    length: sympy.Symbol

    @staticmethod
    def of(tokens: fx.Node) -> Symbols:
        """Read off the tokens placeholder [B, T]."""
        b, t = tokens.meta["val"].shape
        if isinstance(b, int) or isinstance(t, int):
            raise DeriveError(f"the captured graph is specialised to tokens {[b, t]}", where=describe(tokens))
        return Symbols(b.node.expr, t.node.expr)

    def size(self, value: int | torch.SymInt | sympy.Expr) -> Size | None:
        """The polynomial of a size, or None when it has another form (or depends on data).

        Exact forms are read off; forms such as Max(0, T) or Min(T, 4096) are fitted at a few points and verified at
        others.
        """
        if isinstance(value, int):
            return Size(const=value)
        expr = value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)
        if expr.free_symbols - {self.batch, self.length}:
            return None
        return _fit(self, expr)


@functools.lru_cache(maxsize=4096)
def _fit(symbols: Symbols, expr: sympy.Expr) -> Size | None:
    """Solve the polynomial from four corners and verify it at other points."""

    def at(b: int, t: int) -> int:
        return int(expr.subs({symbols.batch: b, symbols.length: t}))

    low, high = 5, 11
    c00, c10, c01, c11 = at(2, low), at(3, low), at(2, high), at(3, high)
    # f(b, t) = const + batch*b + time*t + rows*b*t, solved from four corners
    span = high - low
    rows, rest = divmod((c11 - c01) - (c10 - c00), span)
    if rest:
        return None
    batch = (c10 - c00) - rows * low
    time, rest = divmod(c01 - c00 - rows * 2 * span, span)
    if rest:
        return None
    const = c00 - 2 * batch - time * low - rows * 2 * low
    fit = Size(const, batch, time, rows)
    for b, t in ((2, 7), (4, 17), (7, 29)):
        if at(b, t) != const + batch * b + time * t + rows * b * t:
            return None
    return fit


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Symbolic shape of a node's value; of the first element for nodes with several results."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    if not isinstance(value, torch.Tensor):
        raise DeriveError(f"{node.name} has no tensor shape", where=describe(node))
    return tuple(value.shape)
