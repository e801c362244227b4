"""Where the time of a compiled step goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accelc.codegen.arrays import Array
from accelc.codegen.instructions import Instruction


@dataclass(frozen=True)
class Row:
    """One kind of instruction: calls and seconds a step, and the bytes that its calls must read and write."""

    instruction: str
    calls: int
    seconds: float
    bytes: int

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Profile:
    """One step, averaged: `seconds` in all; `rows`, the slowest first; `waiting`, what the first thread spent at
    barriers; `outside`, the rest, which is Python, torch's products and regions of Inductor's.
    """

    seconds: float
    rows: tuple[Row, ...]
    waiting: float

    @property
    def outside(self) -> float:
        return self.seconds - self.waiting - sum(row.seconds for row in self.rows)

    def text(self) -> str:
        """A table for a terminal."""
        lines = [f"{'instruction':<32}{'calls':>6}{'us':>10}{'share':>7}{'MB':>9}{'GB/s':>7}"]
        for r in self.rows:
            share = r.seconds / self.seconds
            lines.append(
                f"{r.instruction:<32}{r.calls:>6}{r.seconds * 1e6:>10.1f}{share:>7.1%}"
                f"{r.bytes / 1e6:>9.2f}{r.rate / 1e9:>7.1f}"
            )
        for name, seconds in (("waiting at barriers", self.waiting), ("outside instructions", self.outside)):
            lines.append(f"{name:<38}{seconds * 1e6:>10.1f}{seconds / self.seconds:>7.1%}")
        return "\n".join(lines)


def summarize(
    stream: Sequence[Instruction],
    total: float,
    waited: Sequence[float],
    ran: Sequence[float],
    repeats: int,
    committed: int | None,
) -> Profile:
    """A `Profile` from clocked seconds by instruction. `committed`: tokens a row in the cache; None: a full one."""
    calls: dict[str, list[tuple[float, int]]] = {}
    for instruction, seconds in zip(stream, ran, strict=True):
        calls.setdefault(_kind(instruction), []).append((seconds / repeats, _bytes(instruction, committed)))
    rows = [Row(kind, len(c), sum(s for s, _ in c), sum(b for _, b in c)) for kind, c in calls.items()]
    return Profile(total / repeats, tuple(sorted(rows, key=lambda r: -r.seconds)), sum(waited) / repeats)


def _kind(instruction: Instruction) -> str:
    """Its operation and the shape of what it mostly reads: the weight of a linear, the output of all others."""
    arrays = instruction.arrays
    main = arrays[1] if instruction.op == "linear" else arrays[min(instruction.writes)]
    return f"{instruction.op} {'x'.join(map(str, main.size if main else ()))}"


def _bytes(instruction: Instruction, committed: int | None) -> int:
    """Bytes that a call must move: all arrays, but of tables and caches only what one call touches."""
    arrays = instruction.arrays
    if instruction.op == "attention":
        query, key, value, *_ = arrays
        assert query is not None
        seen = None if committed is None else committed + query.size[2]
        return sum(_size(a) for a in (query, arrays[9])) + sum(_size(a, seen, 2) for a in (key, value))
    skipped = {"gather": (0,), "cache_update": (0,)}.get(instruction.op, ())
    return sum(_size(a) for i, a in enumerate(arrays) if i not in skipped)


def _size(array: Array | None, rows: int | None = None, dim: int = 0) -> int:
    """Bytes of the distinct elements, of at most `rows` along `dim`."""
    if array is None:
        return 0
    count = 1
    for d, (n, stride) in enumerate(zip(array.size, array.stride)):
        if stride:
            count *= min(n, rows) if rows is not None and d == dim else n
    return count * array.dtype.itemsize
