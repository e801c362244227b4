"""Token Recycling: every token remembers the likeliest tokens that came behind it, and a tree is read from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelc.ir.errors import DraftError
from accelc.runtime.speculation.draft import (
    Accepted,
    Draft,
    Drafter,
    DraftKind,
    Proposer,
    Setting,
    Source,
    Text,
    register_drafter,
)
from accelc.runtime.speculation.trees import RECYCLING, Layout, Tree


@register_drafter
@dataclass(frozen=True)
class TokenRecycling(Drafter):
    """Drafts from a matrix of successors [V, K] that verification fills: the K likeliest tokens behind each token the
    last time it was verified, be it accepted or not (Luo et al. 2024). Needs no training; the matrix lives as long as
    the decoder, starts at zero and serves all its rows.

    A token that occurs several times in one step is remembered from its deepest accepted occurrence, otherwise from the
    last in the order of rows and nodes.
    """

    name: ClassVar[str] = "token_recycling"
    kind: ClassVar[DraftKind] = DraftKind.DETERMINISTIC

    tree: Tree = RECYCLING

    def __post_init__(self) -> None:
        if not isinstance(self.tree, Tree) or self.tree.depth < 1:
            raise DraftError(f"tree is {self.tree!r}", remedy="Give a Tree with at least one node behind its root.")

    def bind(self, setting: Setting) -> Source:
        return _Source(self.tree.by_level(), setting)


class _Source(Source):
    def __init__(self, tree: Tree, setting: Setting) -> None:
        if tree.width > setting.vocab_size:
            raise DraftError(f"a tree with {tree.width} candidates a node for a vocabulary of {setting.vocab_size}")
        self.size, self.depth = tree.size, tree.depth
        self.layout = tree.layout(setting.device)
        depths = tree.depths
        starts = [depths.index(d) for d in range(tree.depth + 1)] + [tree.size]
        self.levels = [slice(starts[d], starts[d + 1]) for d in range(1, tree.depth + 1)]
        # One row more: where what must not be remembered goes.
        self.successors = torch.zeros(setting.vocab_size + 1, tree.width, dtype=torch.int64, device=setting.device)

    def start(self, text: Text) -> Proposer:
        return Recycler(self.successors, self.layout, self.levels)


class Recycler(Proposer):
    """Reads trees from the matrix [V + 1, K] and writes what verification finds into it."""

    def __init__(self, successors: Tensor, layout: Layout, levels: list[slice]) -> None:
        self._successors, self._layout, self._levels = successors, layout, levels

    def propose(self, text: Text) -> Draft:
        parents, ranks = self._layout.parents[0], self._layout.ranks[0]
        tokens = text.last()[:, None].repeat(1, self._layout.size)
        for level in self._levels:
            tokens[:, level] = self._successors[tokens[:, parents[level]], ranks[level]]
        return Draft(tokens, self._layout)

    def observe(self, draft: Draft, logits: Tensor, accepted: Accepted) -> None:
        vocabulary, width = len(self._successors) - 1, self._successors.shape[1]
        tokens = draft.tokens.flatten()
        best = logits.flatten(0, 1).topk(width, dim=-1).indices  # [B * N, K]
        self._successors[torch.where(remembered(draft, accepted), tokens, vocabulary)] = best


def remembered(draft: Draft, accepted: Accepted) -> Tensor:
    """Which of the nodes [B * N] is the one to remember of those with its token: bool."""
    b, n = draft.tokens.shape
    place = torch.arange(accepted.path.shape[1], device=draft.tokens.device)
    depth = torch.where(place < accepted.counts[:, None], place + 1, 0)  # of accepted nodes, from 1
    rank = torch.zeros_like(draft.tokens).scatter_reduce_(1, accepted.path, depth, "amax")
    order = (rank * (b * n) + torch.arange(b * n, device=rank.device).view(b, n)).flatten()
    tokens = draft.tokens.flatten()
    same = tokens[:, None] == tokens
    return (torch.where(same, order, -1).amax(-1) == order) & (tokens >= 0)
