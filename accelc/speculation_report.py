"""Statistics of speculation and trees as tables and plots."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Group
from rich.table import Table

from accelc.runtime.speculation.statistics import SpeculationStatistics, rates_table
from accelc.runtime.speculation.tuning import Tuned


def render_tuned(tuned: Tuned) -> Group:
    """The tree for a terminal: accuracies, and what its first nodes promise."""
    rates = rates_table("right below an accepted path, by depth (down) and rank", "depth", tuned.accuracy, first=1)
    sizes = Table(title="a step of the tree's first nodes", title_justify="left")
    for heading in ("nodes", "tokens expected", "ms measured", "tokens/s"):
        sizes.add_column(heading, justify="right")
    shown = sorted({1, 2, 3, 6, 12, 24, 48, tuned.tree.size, *tuned.seconds})
    for nodes in shown:
        if nodes > tuned.tree.size:
            continue
        seconds, tokens = tuned.seconds.get(nodes), tuned.expected[nodes - 1]
        measured = ("", "") if seconds is None else (f"{seconds * 1e3:.2f}", f"{tokens / seconds:.0f}")
        sizes.add_row(str(nodes), f"{tokens:.2f}", *measured)
    tree = tuned.tree
    return Group(rates, sizes, f"{tree.size} nodes, {tree.depth} deep; the size: {tuned.chosen}")


def plot_statistics(statistics: SpeculationStatistics, path: Path) -> Path | None:
    """Tokens a step, acceptance by depth and rank, and where the time went, as an SVG file; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    lengths, accuracy, parts = figure.subplots(1, 3)
    given = {n: count for n, count in enumerate(statistics.lengths) if n}
    lengths.bar(list(given), list(given.values()))
    lengths.set(xlabel="tokens of a step (the one behind the drafts counted)", ylabel="steps of a row")
    lengths.set_title(f"{statistics.mean_accepted_length:.2f} tokens a step")
    for rank in range(max(map(len, statistics.reached), default=0)):
        known = [
            (depth + 1, row[rank]) for depth, row in enumerate(statistics.accuracy) if statistics.reached[depth][rank]
        ]
        if known:
            accuracy.plot(*zip(*known, strict=True), marker="o", label=f"rank {rank}")
    accuracy.set(xlabel="depth", ylabel="share accepted below an accepted path", ylim=(0, 1))
    accuracy.legend(fontsize="small")
    steps = max(1, sum(count for count, _ in statistics.step_seconds.values()))
    parts.bar(list(statistics.seconds), [seconds * 1e3 / steps for seconds in statistics.seconds.values()])
    parts.set(ylabel="ms a step")
    parts.set_title(f"{statistics.drafter} with {statistics.rule}")
    figure.savefig(path)
    return path
