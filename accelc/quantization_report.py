"""A quantization plan as a table and as a plot."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from rich.console import Group
from rich.table import Table

from accelc.passes.quantize.budget import PROBE, QuantizationPlan

MOST = 40
"""Weights that the table lists: those that lose most, in all schemes; the file has all of them."""


def render_plan(plan: QuantizationPlan) -> Group:
    """The plan for a terminal: what it costs as a whole, schemes with their shares, and the weights that lose most."""
    count = sum(math.prod(choice.shape) for choice in plan.choices)
    whole = (
        f"{plan.size / 1e6:.1f} MB, {8 * plan.size / count:.2f} bits a weight; nats a token lost on the calibration "
        f"text: {plan.expected:.2e} expected, {plan.measured:.2e} measured "
        f"(perplexity {math.expm1(plan.measured):+.2%})"
    )
    schemes = Table(title="schemes", title_justify="left")
    for heading in ("scheme", "weights", "MB", "nats expected"):
        schemes.add_column(heading, justify="left" if heading == "scheme" else "right")
    for name in sorted({choice.scheme for choice in plan.choices}):
        chosen = [choice for choice in plan.choices if choice.scheme == name]
        size, loss = sum(c.size for c in chosen) / 1e6, sum(c.loss for c in chosen)
        schemes.add_row(name, str(len(chosen)), f"{size:.1f}", f"{loss:.1e}")
    weights = Table(title=f"the {min(MOST, len(plan.choices))} weights that are most sensitive", title_justify="left")
    for heading in ("weight", "shape", f"nats in {PROBE}", "scheme", "nats expected"):
        left = heading in ("weight", "scheme")
        weights.add_column(heading, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    for choice in sorted(plan.choices, key=lambda c: -c.sensitivity)[:MOST]:
        shape = " x ".join(map(str, choice.shape))
        weights.add_row(choice.path, shape, f"{choice.sensitivity:.1e}", choice.scheme, f"{choice.loss:.1e}")
    return Group(whole, schemes, weights)


def plot_plan(plan: QuantizationPlan, path: Path) -> Path | None:
    """Sensitivity over size of every weight, coloured by its scheme, as an SVG file; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name in sorted({choice.scheme for choice in plan.choices}):
        chosen = [choice for choice in plan.choices if choice.scheme == name]
        sizes = [math.prod(choice.shape) for choice in chosen]
        axes.scatter(sizes, [max(choice.sensitivity, 1e-12) for choice in chosen], label=f"{name} ({len(chosen)})")
    axes.set(xscale="log", yscale="log", xlabel="weights in the matrix", ylabel=f"nats a token lost in {PROBE}")
    axes.set_title(f"{plan.size / 1e6:.1f} MB, {plan.measured:.2e} nats a token lost")
    axes.legend()
    figure.savefig(path)
    return path
