"""Counts and table of a sweep."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
import transformers
from family_probe import Row


def verdict(row: Row) -> str:
    """The row's place in the counts: the first stage that it does not pass, or the outcome of compiling it."""
    if not row.builds:
        return "does not build"
    if not row.runs:
        return "does not run on token ids"
    if not row.causal:
        return "not causal"
    return row.outcome or ("exports" if row.exports else "does not export")


def summary(rows: list[Row]) -> str:
    """Counts over all rows, and the share of eligible types that were derived."""
    counts = Counter(verdict(row) for row in rows)
    eligible = [row for row in rows if row.eligible]
    derived = sum(row.outcome == "derived" for row in eligible)
    lines = [f"{len(rows)} types: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()) + "."]
    share = f" ({derived / len(eligible):.1%})" if eligible else ""
    lines.append(
        f"{len(eligible)} are causal, export with a dynamic length and mix tokens by attention only; "
        f"of these {derived} were derived{share}."
    )
    return "\n".join(lines)


def write_markdown(rows: list[Row], path: Path) -> None:
    """Write the table to `path`."""
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    head = [
        "# Families",
        "",
        "Every causal language model type that transformers registers, tried small, with random weights in fp32,",
        f"by `python benchmarks/families.py` ({versions}).",
        "",
        summary(rows),
        "",
        "*Causal*: changing a token changes no earlier logit and no other row, and a prefix gives the same logits.",
        "*Exports*: `torch.export` with dynamic batch and length. *Other mixing*: what carries tokens along the",
        "sequence besides attention, seen in the exported graph. *Result*: derived means that greedy tokens and the",
        "logits at every position equal those of the original forward.",
        "",
        "| type | causal | exports | other mixing | result | reason |",
        "|---|---|---|---|---|---|",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(head + [_line(row) for row in rows]) + "\n")


def _line(row: Row) -> str:
    mark = {True: "yes", False: "no", None: ""}
    mixing = "" if row.mixers is None else ", ".join(row.mixers) or "none"
    reason = row.reason.replace("|", "\\|")
    return f"| {row.model_type} | {mark[row.causal]} | {mark[row.exports]} | {mixing} | {verdict(row)} | {reason} |"
