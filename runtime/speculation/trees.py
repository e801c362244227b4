"""Trees of draft tokens as data, and what they look like to tensor programs.

Node 0 is the root: the last token that is known, and not yet in the cache. Every other node has a parent in front of it
and a rank among its siblings, 0 the most likely.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accelc.ir.errors import TreeError
from accelc.runtime.arguments import is_integer

LIMIT = 128
"""Most nodes of a tree, the root included."""
WORD = 64
WORDS = LIMIT // WORD
"""Words of a node's ancestors."""


@dataclass(frozen=True)
class Tree:
    """A fixed tree. ``parents[0]`` is -1; ``parents[i] < i``; ``ranks[i]`` tells the children of one node apart.

    Raises `TreeError` for what is no tree.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.ranks) or not self.parents or self.parents[0] != -1:
            raise TreeError("a tree needs a root, and one parent and rank for each node")
        if len(self.parents) > LIMIT:
            raise TreeError(f"a tree of {len(self.parents)} nodes", remedy=f"Keep at most {LIMIT}, the root included.")
        for node, (parent, rank) in enumerate(zip(self.parents[1:], self.ranks[1:]), start=1):
            if not 0 <= parent < node or rank < 0:
                raise TreeError(f"node {node} has the parent {parent} and the rank {rank}")
        edges = list(zip(self.parents, self.ranks))
        if twice := {edge for edge in edges if edges.count(edge) > 1}:
            raise TreeError(f"two children of node {min(twice)[0]} have the rank {min(twice)[1]}")

    @classmethod
    def of_paths(cls, paths: Iterable[Sequence[int]]) -> Tree:
        """From paths of ranks, one a node: (0,) is the likeliest child of the root, (0, 2) the third child of that.

        A node stands behind its parent, and otherwise in the order given: a prefix of the order is a tree too.
        """
        try:
            wanted = [tuple(path) for path in paths]
        except TypeError as error:
            raise TreeError(
                f"paths are {paths!r}", remedy="Give sequences of ranks, such as [(0,), (0, 1)]."
            ) from error
        if any(not path or not all(isinstance(r, int) and r >= 0 for r in path) for path in wanted):
            raise TreeError("a path is empty or holds something else than ranks >= 0")
        place: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [-1], [0]
        for path in wanted:
            if path in place:
                raise TreeError(f"the path {list(path)} occurs twice")
            if path[:-1] not in place:
                raise TreeError(f"the path {list(path)} has no parent in front of it")
            place[path] = len(parents)
            parents.append(place[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks))

    @classmethod
    def chain(cls, length: int) -> Tree:
        """The root and `length` tokens behind it, one after another."""
        if not is_integer(length) or not 0 <= length < LIMIT:
            raise TreeError(f"a chain of {length!r} tokens", remedy=f"Give an integer from 1 to {LIMIT - 1}.")
        return cls(tuple(range(-1, length)), (0,) * (length + 1))

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Edges from the root, by node."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Of the deepest node."""
        return max(self.depths)

    @property
    def width(self) -> int:
        """Largest rank, plus one: candidates that are needed at a node."""
        return max(self.ranks) + 1

    def paths(self) -> list[tuple[int, ...]]:
        """The ranks on the way to each node behind the root, as `of_paths` takes them."""
        found: list[tuple[int, ...]] = [()]
        for node in range(1, self.size):
            found.append((*found[self.parents[node]], self.ranks[node]))
        return found[1:]

    def save(self, path: str | Path) -> None:
        """Write its paths as JSON."""
        Path(path).write_text(json.dumps(self.paths()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Tree:
        """From a JSON list of paths of ranks. Raises `TreeError`."""
        try:
            given = json.loads(Path(path).read_text())
            return cls.of_paths([tuple(one) for one in given])
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, TreeError):
                raise
            raise TreeError(
                f"no tree can be read: {type(error).__name__}: {error}",
                where=str(path),
                remedy="Give a JSON file with paths of ranks, such as [[0], [1], [0, 0]]; Tree.save writes one.",
            ) from error

    def cut(self, size: int) -> Tree:
        """The first `size` nodes."""
        return Tree(self.parents[:size], self.ranks[:size])

    def by_level(self) -> Tree:
        """The same tree with its nodes in the order of their depth."""
        depths = self.depths
        order = sorted(range(self.size), key=lambda node: (depths[node], node))
        place = {node: index for index, node in enumerate(order)}
        parents = tuple(-1 if self.parents[n] < 0 else place[self.parents[n]] for n in order)
        return Tree(parents, tuple(self.ranks[n] for n in order))

    def layout(self, device: torch.device | str = "cpu") -> Layout:
        """The same for tensor programs, for all rows of a batch alike."""
        parents = torch.tensor([self.parents], device=device)
        return layout_of(parents, torch.tensor([self.ranks], device=device), depth=self.depth, width=self.width)


@dataclass(frozen=True, eq=False)
class Layout:
    """Trees of N nodes and depth D for tensor programs; the leading dim is 1 where all rows have the same."""

    parents: Tensor
    """[B, N] int64, -1 for the root."""
    ranks: Tensor
    """[B, N] int64."""
    depths: Tensor
    """[B, N] int64."""
    paths: Tensor
    """[B, N, D + 1] int64: the node at each depth on the way to a node; behind it, its own place: d at depth d."""
    words: Tensor
    """[B, N, W] int64: bit j of a node's words says that node j is an ancestor of it or it itself."""

    width: int
    """Ranks below it occur."""

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return self.parents.shape[1]

    @property
    def depth(self) -> int:
        """Most edges from the root."""
        return self.paths.shape[-1] - 1

    def cut(self, size: int) -> Layout:
        """The first `size` nodes of each tree. The depth is what so many can have: how deep they are is known on the
        device alone.
        """
        if size == self.size:
            return self
        return Layout(
            self.parents[:, :size].contiguous(),
            self.ranks[:, :size].contiguous(),
            self.depths[:, :size].contiguous(),
            self.paths[:, :size, :size].contiguous(),
            self.words[:, :size].contiguous(),
            self.width,
        )


def layout_of(parents: Tensor, ranks: Tensor, *, depth: int, width: int) -> Layout:
    """What follows from parents and ranks [B, N] (int64; each parent in front of its children, -1 for the root) of
    trees at most `depth` deep with ranks below `width`. Tensor operations of fixed shape alone.
    """
    b, n = parents.shape
    device = parents.device
    climbs = [torch.arange(n, device=device).expand(b, n)]  # the node, its parent, ... ; the root stays the root
    up = parents.clamp(min=0)
    for _ in range(depth):
        climbs.append(up.gather(1, climbs[-1]))
    climb = torch.stack(climbs, dim=-1)  # [B, N, D + 1]
    depths = (climb[..., :-1] != 0).sum(-1)  # steps until the root
    place = torch.arange(depth + 1, device=device)
    back = depths[..., None] - place  # steps up to the node at each depth
    paths = torch.where(back >= 0, climb.gather(2, back.clamp(min=0)), place)
    bit = torch.ones((), dtype=torch.int64, device=device) << (paths % WORD)
    words = [torch.where((back >= 0) & (paths // WORD == word), bit, 0).sum(-1) for word in range(WORDS)]
    return Layout(parents, ranks, depths, paths, torch.stack(words, dim=-1), width)


def best_tree(accuracy: Sequence[Sequence[float]], nodes: int) -> Tree:
    """The tree of `nodes` drafts (the root not counted) with the most expected accepted tokens, found greedily.

    accuracy[d][r]: how often the candidate of rank r is right at depth d (0 for the root's children), given that the
    path to it is. A node's worth is the product along its path (Cai et al. 2024); nodes come in the order of their
    worth, so that each prefix of the tree is the best tree of its size.
    """
    table = [list(row) for row in accuracy]
    if nodes < 1 or not table or not table[0]:
        raise TreeError("a tree needs at least one node, and accuracies of at least one depth and rank")
    if any(not 0 <= a <= 1 for row in table for a in row):
        raise TreeError("an accuracy lies outside [0, 1]")
    worth: dict[tuple[int, ...], float] = {(): 1.0}  # of the chosen nodes, in their order
    frontier: dict[tuple[int, ...], float] = {(0,): table[0][0]}
    while frontier and len(worth) <= nodes:
        path = max(frontier, key=lambda p: (frontier[p], -len(p), [-r for r in p]))
        worth[path] = frontier.pop(path)
        depth, rank = len(path) - 1, path[-1] + 1
        if rank < len(table[depth]):
            frontier[(*path[:-1], rank)] = worth[path[:-1]] * table[depth][rank]
        if depth + 1 < len(table) and table[depth + 1]:
            frontier[(*path, 0)] = worth[path] * table[depth + 1][0]
    return Tree.of_paths(list(worth)[1:])


def _paths(digits: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, path)) for path in digits.split()]


MEDUSA = Tree.of_paths(_paths(
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000"
    " 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
))  # fmt: skip
"""Medusa's default tree (mc_sim_7b_63; Cai et al. 2024): 63 drafts, up to 10 candidates, 4 deep; the best first."""

RECYCLING = Tree.of_paths(_paths(
    "0 1 2 3 4 5 6 7 00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 000 001 002 003 004 005 006 007 010"
    " 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500 0000 0001 0002 0003 0004 0010 0011 0020 0030 0040"
    " 0100 0200 1000 2000 3000 00000 00001 00002 00010 00020 00100 01000 10000 000000 000001 000100"
))  # fmt: skip
"""Token Recycling's tree (Luo et al. 2024): 80 drafts, 8 candidates, 6 deep; in the order of depth."""
