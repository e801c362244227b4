"""What speculation achieved: tokens a step, which candidates were right, where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor

from accelc.runtime.speculation.draft import Accepted, Draft

PARTS = ("draft", "verify", "accept", "update")


@dataclass(frozen=True)
class SpeculationStatistics:
    """Of one generation. A row-step is one step of one row that had not ended."""

    drafter: str
    rule: str
    row_steps: int
    tokens: int
    """New tokens of these row-steps, those behind the end of a row included."""
    lengths: tuple[int, ...]
    """lengths[n]: row-steps that gave n tokens."""
    reached: tuple[tuple[int, ...], ...]
    """reached[d][r]: nodes of rank r below an accepted path of d drafts, of all row-steps: what could be accepted."""
    accepted: tuple[tuple[int, ...], ...]
    """accepted[d][r]: how many of them were."""
    seconds: dict[str, float]
    """Time by part: draft, verify (the compiled step), accept (with the commit), update (of the drafter)."""

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

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in self.seconds.items())
        return (
            f"{self.drafter} with {self.rule}: {self.mean_accepted_length:.2f} tokens a step "
            f"(the one behind the accepted drafts counted); ms: {parts}"
        )

    def __rich__(self) -> Table:
        """Acceptance by depth and rank, for `rich.print`."""
        table = Table(title=str(self), title_justify="left")
        table.add_column("depth", justify="right")
        ranks = max((len(row) for row in self.reached), default=0)
        for rank in range(ranks):
            table.add_column(f"rank {rank}", justify="right")
        for depth, row in enumerate(self.accuracy):
            known = [f"{a:.2f}" if self.reached[depth][r] else "" for r, a in enumerate(row)]
            table.add_row(str(depth + 1), *known)
        return table


@dataclass
class Counters:
    """Sums over the steps of a generation, on the device until they are asked for."""

    row_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _sums: tuple[Tensor, Tensor, Tensor] | None = None
    """lengths [D + 2], reached [D, K] and accepted [D, K] of `SpeculationStatistics`."""

    def add(self, draft: Draft, accepted: Accepted, rows: Sequence[int], times: Sequence[float]) -> None:
        """One step: `rows` had not ended before it; `times`: begin and end of its parts."""
        for part, begin, end in zip(PARTS, times, times[1:]):
            self.seconds[part] += end - begin
        self.row_steps += len(rows)
        layout = draft.layout
        b = len(draft.tokens)
        if self._sums is None:
            shapes = ((layout.depth + 2,), (layout.depth, layout.width), (layout.depth, layout.width))
            self._sums = tuple(draft.tokens.new_zeros(shape) for shape in shapes)  # type: ignore[assignment]
        assert self._sums is not None
        lengths, reached, kept = self._sums
        counts = torch.zeros(b, dtype=torch.int64, device=draft.tokens.device)
        index = torch.tensor(rows, device=counts.device)
        counts[index] = 1
        lengths.scatter_add_(0, accepted.counts, counts)
        place = torch.arange(accepted.path.shape[1], device=counts.device)
        on_path = torch.zeros_like(draft.tokens).scatter_reduce_(
            1, accepted.path, (place < accepted.counts[:, None]).long(), "amax"
        )
        parents = layout.parents.expand(b, -1)[:, 1:]
        below = on_path.gather(1, parents) * (draft.tokens[:, 1:] >= 0) * counts[:, None]
        cell = ((layout.depths[:, 1:] - 1) * layout.width + layout.ranks[:, 1:]).expand(b, -1)
        reached.view(-1).scatter_add_(0, cell.flatten(), below.flatten())
        kept.view(-1).scatter_add_(0, cell.flatten(), (below * on_path[:, 1:]).flatten())

    def summary(self, drafter: str, rule: str) -> SpeculationStatistics:
        """The sums as numbers."""
        lengths, reached, accepted = ([], [], []) if self._sums is None else (t.tolist() for t in self._sums)
        return SpeculationStatistics(
            drafter=drafter,
            rule=rule,
            row_steps=self.row_steps,
            tokens=sum(n * count for n, count in enumerate(lengths)),
            lengths=tuple(lengths),
            reached=tuple(map(tuple, reached)),
            accepted=tuple(map(tuple, accepted)),
            seconds=dict(self.seconds),
        )
