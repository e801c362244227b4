"""What speculation achieved: tokens a step, which candidates were right, where the time went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from accelc.ir import Exactness
from accelc.ir.errors import InputError
from accelc.runtime.clock import Clock, Mark
from accelc.runtime.speculation.outcome import Outcome
from accelc.runtime.speculation.trees import WORD, Layout

FORMAT = "accelc.speculation.1"
PARTS = ("draft", "verify", "accept", "update")


@dataclass(frozen=True)
class SpeculationStatistics:
    """Of one generation. A row-step is one step of one row that had not ended."""

    drafter: str
    rule: str
    row_steps: int
    tokens: int
    """New tokens of these row-steps; what a step accepted behind the end of its row is not counted."""
    lengths: tuple[int, ...]
    """lengths[n]: row-steps that gave n tokens."""
    reached: tuple[tuple[int, ...], ...]
    """reached[d][r]: nodes of rank r below an accepted path of d drafts, of all row-steps: what could be accepted."""
    accepted: tuple[tuple[int, ...], ...]
    """accepted[d][r]: how many of them were."""
    seconds: dict[str, float]
    """Time by part: draft, verify (the compiled step), accept (with the commit), update (of the drafter)."""
    batch: int = 1
    lossy: bool = False
    """Whether the rule changes the distribution."""
    step_seconds: dict[int, tuple[int, float]] = field(default_factory=dict)
    """By nodes of a step: how many steps had so many, and the median of their seconds, drafting included."""

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a row-step: the accepted drafts and the one behind them, which plain decoding has too."""
        return self.tokens / self.row_steps if self.row_steps else float("nan")

    @property
    def accuracy(self) -> list[list[float]]:
        """How often the candidate of each rank was right at each depth, of the times it could be: for `best_tree`."""
        return [
            [a / r if r else 0.0 for r, a in zip(reached, accepted)]
            for reached, accepted in zip(self.reached, self.accepted)
        ]

    def save(self, path: str | Path) -> None:
        """Write a JSON file, for `accelc tune-tree`."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SpeculationStatistics:
        """From a file that `save` wrote. Raises InputError."""
        try:
            given = json.loads(Path(path).read_text())
            if given.pop("format") != FORMAT:
                raise ValueError("another format")
            for name in ("reached", "accepted"):
                given[name] = tuple(tuple(map(int, row)) for row in given[name])
            given["lengths"] = tuple(map(int, given["lengths"]))
            given["step_seconds"] = {int(n): (int(c), float(s)) for n, (c, s) in given["step_seconds"].items()}
            return cls(**given)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"no statistics of speculation: {type(error).__name__}: {error}",
                where=str(path),
                remedy="Record some: accelc generate --draft ... --statistics FILE.",
            ) from error

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in self.seconds.items())
        what = f"{self.drafter} with {self.rule}{' (LOSSY)' if self.lossy else ''}"
        if not self.row_steps:
            return f"{what}: no step"
        return (
            f"{what}: {self.mean_accepted_length:.2f} tokens a step "
            f"(the one behind the accepted drafts counted); ms: {parts}"
        )

    def table(self) -> Table:
        """How often the candidates of each depth and rank were right, for `rich.print`."""
        rates = [
            [rate if tried else None for rate, tried in zip(row, self.reached[depth])]
            for depth, row in enumerate(self.accuracy)
        ]
        return rates_table("accepted below an accepted path, by depth (down) and rank", "depth", rates, first=1)


def rates_table(title: str, what: str, rates: Sequence[Sequence[float | None]], *, first: int = 0) -> Table:
    """Rates by rank, a row for each of what is numbered from `first` on; None is not known."""
    table = Table(title=title, title_justify="left")
    for name in (what, *map(str, range(max(map(len, rates), default=0)))):
        table.add_column(name, justify="right", min_width=4)
    for number, row in enumerate(rates, first):
        table.add_row(str(number), *("" if rate is None else f"{rate:.2f}" for rate in row))
    return table


@dataclass(frozen=True)
class Step:
    """What happened in one step."""

    layout: Layout
    """The trees."""
    outcome: Outcome
    rows: list[int]
    """Those that had not ended before it."""
    marks: Sequence[Mark]
    """Begin and end of its parts."""


@dataclass
class Recorder:
    """Keeps what each step of a generation did, and counts when it is asked."""

    clock: Clock
    _steps: list[Step] = field(default_factory=list)
    _plain: list[tuple[list[int], float]] = field(default_factory=list)
    """Steps without a tree: rows, seconds."""

    def add(self, layout: Layout, outcome: Outcome, rows: list[int], marks: Sequence[Mark]) -> None:
        """One step with a tree."""
        self._steps.append(Step(layout, outcome, rows, marks))

    def add_plain(self, rows: list[int], seconds: float) -> None:
        """One step of plain decoding, of the rows that had not ended."""
        self._plain.append((rows, seconds))

    def summary(
        self, drafter: str, rule: str, taken: Sequence[int], exactness: Exactness = Exactness.DISTRIBUTION
    ) -> SpeculationStatistics:
        """The statistics of all steps so far, of which rows have taken so many tokens."""
        by_layout: dict[Layout, list[Step]] = {}
        seconds, times = dict.fromkeys(PARTS, 0.0), {1: [took for _, took in self._plain]}
        for step in self._steps:
            by_layout.setdefault(step.layout, []).append(step)
            parts = self.clock.seconds(step.marks)
            for part, took in zip(PARTS, parts, strict=True):
                seconds[part] += took
            times.setdefault(step.layout.size, []).append(sum(parts))
        seconds["verify"] += sum(took for _, took in self._plain)
        depth = max((step.layout.depth for step in self._steps), default=0)
        width = max((step.layout.width for step in self._steps), default=0)
        lengths = torch.zeros(depth + 2, dtype=torch.int64)
        lengths[1] = sum(len(rows) for rows, _ in self._plain)
        reached, accepted = (torch.zeros(depth, width, dtype=torch.int64) for _ in range(2))
        for steps in by_layout.values():
            counts, cells, below, kept = _of_rows(steps, width)
            lengths += torch.bincount(counts, minlength=depth + 2)
            reached.view(-1).scatter_add_(0, cells, below)
            accepted.view(-1).scatter_add_(0, cells, kept)
        for last, surplus in self._surplus(taken):
            lengths[last] -= 1
            lengths[last - surplus] += 1
        return SpeculationStatistics(
            drafter=drafter,
            rule=rule,
            row_steps=int(lengths.sum()),
            tokens=int((lengths * torch.arange(depth + 2)).sum()),
            lengths=tuple(lengths.tolist()),
            reached=tuple(map(tuple, reached.tolist())),
            accepted=tuple(map(tuple, accepted.tolist())),
            seconds=seconds,
            batch=len(taken),
            lossy=exactness is Exactness.LOSSY,
            step_seconds={nodes: (len(took), median(took)) for nodes, took in sorted(times.items()) if took},
        )

    def _surplus(self, taken: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Of each row that did not take all that its last step with a tree gave: how many that gave, and how many of
        them were not taken.
        """
        given, last = [0] * len(taken), [0] * len(taken)
        for rows, _ in self._plain:
            for row in rows:
                given[row] += 1
        for step in self._steps:
            counts = step.outcome.counts
            for row in step.rows:
                given[row] += counts[row]
                last[row] = counts[row]
        for had, got, count in zip(given, taken, last, strict=True):
            if had > got:
                yield count, had - got


def _of_rows(steps: Sequence[Step], width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all rows R of steps with one layout: tokens they took [R]; (depth - 1) * width + rank of each draft
    [R * (N - 1)]; which of them were below a kept node and had a token, and which were kept [R * (N - 1)] int64.
    """
    layout = steps[0].layout
    b, n = len(steps[0].outcome.rows), layout.size
    index = torch.tensor([number * b + row for number, step in enumerate(steps) for row in step.rows])
    tokens = torch.tensor([row for step in steps for row in step.outcome.drafted])[index]
    last = torch.tensor([node for step in steps for node in step.outcome.nodes])[index, None]
    parents, ranks, depths, words = (
        t.cpu()[index % b if len(t) > 1 else index * 0]
        for t in (layout.parents, layout.ranks, layout.depths, layout.words)
    )
    ancestors = words.gather(1, last[..., None].expand(-1, -1, words.shape[2]))[:, 0]
    on_path = ancestors.repeat_interleave(WORD, dim=1)[:, :n] >> (torch.arange(n) % WORD) & 1
    below = on_path.gather(1, parents[:, 1:]) * (tokens[:, 1:] >= 0)
    cells = (depths[:, 1:] - 1) * width + ranks[:, 1:]
    counts = depths.gather(1, last).squeeze(1) + 1
    return counts, cells.flatten(), below.flatten(), (below * on_path[:, 1:]).flatten()
