"""What the host reads of a step: all of it in one tensor, so that a device is waited for once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.runtime.functions import Functions
from accelc.runtime.speculation.draft import Accepted, Draft


def packed(draft: Draft, accepted: Accepted, call: Functions) -> Tensor:
    """[B, 2 + 2 (D + 1) + N] int64, for `Outcome`."""
    (row,) = call(in_a_row, accepted.counts, accepted.node, accepted.tokens, accepted.path, draft.tokens)
    return row


def in_a_row(counts: Tensor, node: Tensor, tokens: Tensor, path: Tensor, drafted: Tensor) -> tuple[Tensor]:
    """The fields of `Accepted`, and the draft's tokens, behind each other."""
    return (torch.cat([counts[:, None], node[:, None], tokens, path, drafted], dim=1),)


@dataclass(frozen=True)
class Outcome:
    """One step on the host, row by row."""

    rows: list[list[int]]
    """[B][2 + 2 (D + 1) + N]"""
    width: int
    """D + 1: most tokens of a row."""

    @classmethod
    def read(cls, row: Tensor, accepted: Accepted) -> Outcome:
        """From `packed`."""
        return cls(row.tolist(), accepted.path.shape[1])

    @property
    def counts(self) -> list[int]:
        """New tokens of each row."""
        return [row[0] for row in self.rows]

    @property
    def nodes(self) -> list[int]:
        """The last node kept of each row."""
        return [row[1] for row in self.rows]

    @property
    def tokens(self) -> list[list[int]]:
        """Of which the first that `counts` says are new."""
        return [row[2 : 2 + self.width] for row in self.rows]

    @property
    def paths(self) -> list[list[int]]:
        """The nodes kept of each row."""
        begin = 2 + self.width
        return [row[begin : begin + row[0]] for row in self.rows]

    @property
    def drafted(self) -> list[list[int]]:
        """The tokens [B][N] of the trees."""
        return [row[2 + 2 * self.width :] for row in self.rows]
