"""Token Recycling: every token remembers the likeliest tokens that came behind it, and a tree is read from that."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelc.ir.errors import DraftError
from accelc.runtime.session import TappedChunk
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
from accelc.runtime.speculation.target import TargetSampler
from accelc.runtime.speculation.trees import RECYCLING, Tree


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
            raise DraftError(
                f"a tree with {tree.width} candidates a node for {setting.vocab_size} tokens",
                remedy="Leave out the nodes of the highest ranks.",
            )
        self.size, self.depth = tree.size, tree.depth
        self._proposer = _Recycler(tree, setting)

    def start(self, text: Text, sampler: TargetSampler, prompts: Sequence[TappedChunk]) -> Proposer:
        return self._proposer


class _Recycler(Proposer):
    """Reads trees from the matrix and writes what verification finds into it."""

    repeatable = True

    def __init__(self, tree: Tree, setting: Setting) -> None:
        self._call, self._layout = setting.call, tree.layout(setting.device)
        # One row more: where what must not be remembered goes.
        self._successors = torch.zeros(setting.vocab_size + 1, tree.width, dtype=torch.int64, device=setting.device)
        self._read, self._learn = functools.partial(read_tree, tree=tree), functools.partial(learn, width=tree.width)

    def propose(self, text: Text, nodes: int) -> Draft:
        (tokens,) = self._call(self._read, self._successors, text.tokens, text.lengths)
        return Draft(tokens, self._layout)

    def observe(self, draft: Draft, logits: Tensor, accepted: Accepted, taps: tuple[Tensor, ...]) -> None:
        self._call(self._learn, self._successors, logits, draft.tokens, accepted.path, accepted.counts)


def read_tree(successors: Tensor, tokens: Tensor, lengths: Tensor, tree: Tree) -> tuple[Tensor]:
    """A tree, whose nodes stand by depth, below the last tokens of texts [B, L] of lengths [B]: [B, N]."""
    levels = [tokens.gather(1, lengths[:, None] - 1)]
    begin = 0  # of the level above
    for depth in range(1, tree.depth + 1):
        nodes = [node for node in range(tree.size) if tree.depths[node] == depth]
        parents = torch.tensor([tree.parents[node] - begin for node in nodes], device=tokens.device)
        ranks = torch.tensor([tree.ranks[node] for node in nodes], device=tokens.device)
        above = levels[-1].gather(1, parents.expand(len(tokens), -1))
        levels.append(successors[above, ranks])
        begin = nodes[0]
    return (torch.cat(levels, dim=1),)


def learn(
    successors: Tensor, logits: Tensor, tokens: Tensor, path: Tensor, counts: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Write what the nodes of a tree teach into the matrix [V + 1, width]: into rows [B * N], its last one for nodes
    that do not count, the `width` likeliest tokens behind each node [B * N, width]. Returns both.
    """
    b, n, vocabulary = logits.shape
    node, every = torch.arange(n, device=tokens.device), torch.arange(b * n, device=tokens.device)
    rank = torch.where(node == path[:, :1], 1, 0)  # of accepted nodes, from 1
    for depth in range(1, path.shape[1]):
        on_path = (node == path[:, depth : depth + 1]) & (counts[:, None] > depth)
        rank = torch.where(on_path, depth + 1, rank)
    order = (rank * (b * n) + every.view(b, n)).flatten()
    flat = tokens.flatten()
    same = torch.where(flat[:, None] == flat, order, -1).float()
    last = torch.ops.accelc.top_k(same, 1).squeeze(1) == every
    rows = torch.where(last & (flat >= 0), flat, vocabulary)
    best = torch.ops.accelc.top_k(logits, width).flatten(0, 1)
    torch.ops.accelc.scatter_rows(successors, rows, best)
    return rows, best
