"""The tree that recorded statistics ask for: accuracies say which, step times how large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from accelc.ir.errors import InputError
from accelc.runtime.speculation.statistics import SpeculationStatistics
from accelc.runtime.speculation.trees import LIMIT, Tree, best_tree

FEWEST = 20
"""Steps of a size without which its time is not believed."""


@dataclass(frozen=True)
class Tuned:
    """A tree with what it promises on text like that of the statistics."""

    tree: Tree
    accuracy: tuple[tuple[float, ...], ...]
    """By depth and rank, over all statistics."""
    expected: tuple[float, ...]
    """Tokens that a step of 1, 2, ... of its nodes gives, the one behind the drafts counted."""
    seconds: dict[int, float]
    """Of a step, by nodes, where it was measured."""
    chosen: str
    """How its size was chosen, in words."""


def tune_tree(statistics: Sequence[SpeculationStatistics], nodes: int | None = None) -> Tuned:
    """The tree with the most expected tokens for `nodes` nodes, the root included; None takes as many as gave most
    tokens a second, by the recorded step times (64 where fewer than two sizes were recorded).

    Raises InputError for statistics without drafts, or of several drafters.
    """
    drafters = sorted({one.drafter for one in statistics})
    if len(drafters) != 1:
        raise InputError(f"statistics of {', '.join(drafters) or 'nothing'}", remedy="Give those of one drafter.")
    if nodes is not None and not 2 <= nodes <= LIMIT:
        raise InputError(f"a tree of {nodes} nodes", remedy=f"Give a number from 2 to {LIMIT}, the root included.")
    accuracy = merged_accuracy(statistics)
    if not accuracy:
        raise InputError("no draft was below an accepted path", remedy="Record a longer generation.")
    if not any(rate > 0 for level in accuracy for rate in level):
        raise InputError("no draft was accepted", remedy="Record a longer generation, with --draft-nodes that drafts.")
    seconds = merged_seconds(statistics)
    chosen = "as asked"
    if nodes is None and len(seconds) < 2:
        nodes, chosen = 64, f"no choice: fewer than two sizes were measured {FEWEST} times"
    whole = best_tree(accuracy, (nodes or LIMIT) - 1)
    expected = expected_tokens(whole, accuracy)
    worthy = [n for n in range(2, whole.size + 1) if expected[n - 1] > expected[n - 2]]
    whole = whole.cut(max(worthy, default=2))  # what was never right is no draft
    if nodes is None:
        rates = {n: expected[min(n, whole.size) - 1] / s for n, s in seconds.items()}
        nodes = min(max(2, max(rates, key=lambda n: rates[n])), whole.size)
        chosen = f"most tokens a second of the sizes {', '.join(map(str, seconds))}"
    tree = whole.cut(min(nodes, whole.size))
    return Tuned(tree, tuple(map(tuple, accuracy)), tuple(expected[: tree.size]), seconds, chosen)


def merged_accuracy(statistics: Sequence[SpeculationStatistics]) -> list[list[float]]:
    """By depth and rank; a candidate that never could be right counts as wrong."""
    depth = max(len(one.reached) for one in statistics)
    found = []
    for level in range(depth):
        rows = [(one.reached[level], one.accepted[level]) for one in statistics if level < len(one.reached)]
        width = max(len(reached) for reached, _ in rows)
        counts = [
            (sum(a[r] for _, a in rows if r < len(a)), sum(t[r] for t, _ in rows if r < len(t))) for r in range(width)
        ]
        if not any(tried for _, tried in counts):
            break
        found.append([right / tried if tried else 0.0 for right, tried in counts])
    return found


def merged_seconds(statistics: Sequence[SpeculationStatistics]) -> dict[int, float]:
    """Median seconds of a step, by nodes, of sizes that were run often enough."""
    times: dict[int, list[float]] = {}
    for one in statistics:
        for nodes, (count, seconds) in one.step_seconds.items():
            if count >= FEWEST:
                times.setdefault(nodes, []).append(seconds)
    return {nodes: median(found) for nodes, found in sorted(times.items())}


def expected_tokens(tree: Tree, accuracy: Sequence[Sequence[float]]) -> list[float]:
    """Tokens that a step gives with the first 1, 2, ... nodes of a tree, when candidates are right as often as said."""
    worth = [1.0]
    for node in range(1, tree.size):
        depth, rank = tree.depths[node] - 1, tree.ranks[node]
        known = depth < len(accuracy) and rank < len(accuracy[depth])
        worth.append(worth[tree.parents[node]] * (accuracy[depth][rank] if known else 0.0))
    return [sum(worth[:size]) for size in range(1, tree.size + 1)]
