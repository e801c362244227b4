"""Counts and table of a sweep."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path

from environment import describe
from family_outcome import Outcome
from family_probe import Row

REFUSALS = {None, Outcome.REFUSED.value, Outcome.NOT_CAUSAL.value}
"""What may become of a model that is not causal."""


def verdict(row: Row) -> str:
    """The row's place in the counts: how its process ended, the stage it does not pass, or what compiling gave."""
    if row.stopped:
        return row.stopped
    if not row.builds:
        return "does not build"
    if not row.runs:
        return "does not run on token ids"
    if not row.causal and row.outcome in REFUSALS:
        return "not causal"
    return row.outcome or ("exports" if row.exports else "does not export")


def summary(rows: list[Row]) -> str:
    """Counts over all rows; the share of eligible types that were derived, and the names of the others."""
    counts = Counter(verdict(row) for row in rows)
    eligible = [row for row in rows if row.eligible]
    failed = [row.model_type for row in eligible if verdict(row) != "derived"]
    derived = len(eligible) - len(failed)
    share = f" ({derived / len(eligible):.1%})" if eligible else ""
    others = f"; not derived: {', '.join(failed)}" if failed else ""
    wrong = counts[Outcome.WRONG.value]
    return "\n".join(
        [
            f"**{len(rows)} types**: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()) + ".",
            f"**{len(eligible)} are causal, export with a dynamic length and mix tokens by attention only; of these "
            f"{derived} were derived{share}**{others}.",
            f"Of the other {len(rows) - len(eligible)}, "
            + ", ".join(f"{count} {why}" for why, count in Counter(map(ineligible, rows)).most_common() if why)
            + f". Silently wrong: {wrong or 'none'}.",
        ]
    )


def ineligible(row: Row) -> str:
    """The first reason why a row does not count, empty for one that does."""
    if row.eligible:
        return ""
    if row.stopped:
        return "were stopped"
    if not row.runs:
        return "do not build or run on token ids"
    if not row.causal:
        return "are not causal"
    if not row.exports:
        return "do not export"
    return "mix tokens in another way too"


def write_markdown(rows: list[Row], path: Path, registered: int) -> None:
    """Write the page to `path`; it says so when the rows are fewer than the `registered` types."""
    here = describe()
    versions = ", ".join(f"{name} {here['versions'][name].partition('+')[0]}" for name in ("torch", "transformers"))
    commits = ", ".join(sorted({row.commit for row in rows if row.commit})) or "unknown"
    partial = [f"**Only {len(rows)} of the {registered} registered types so far.**", ""] * (len(rows) < registered)
    head = [
        "# Families",
        "",
        "Every causal language model type that transformers registers, tried small, with random weights in fp32.",
        f"`python benchmarks/families.py`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}: commit {commits}; "
        f"{versions}; Python {here['python']}; {here['cpu']}; {sum(row.seconds for row in rows) / 60:.0f} minutes of "
        "one core.",
        "",
        *partial,
        summary(rows),
        "",
        _library(rows),
        "",
        "*Causal*: changing a token changes no earlier logit and no other row, and a prefix gives the same logits; on",
        "ordinary tokens and with special ones (padding ...) among them.",
        "*Exports*: `torch.export` with dynamic batch and length, if need be with conditions on sizes as assertions",
        "where these hold at every length from 4 on. *Other mixing*: what carries token values along besides attention",
        "(convolutions, recurrences, running sums, shifts), seen in the exported graph; position ids that number the",
        "tokens which are no padding do not count. A type with a *no* or with other mixing is tried all the same, but",
        "does not enter the share.",
        "",
        "*Result*: derived means that greedy tokens from a batch of prompts of different lengths are the original",
        "forward's choice (run row by row, without cache or padding), and that the logits at every position equal",
        "its own when rows are fed in uneven chunks and rolled back, with ordinary and with special tokens. Silently",
        "wrong would be a decoder that was handed out and fails this, or one of a model that is not causal.",
        "*Stopped* types ran past the time limit or were killed; they count as tried.",
        "",
        "| type | causal | exports | other mixing | result | reason |",
        "|---|---|---|---|---|---|",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(head + [_line(row) for row in rows]) + "\n")


def _library(rows: list[Row]) -> str:
    """How transformers' own generation compares."""
    derived = [row for row in rows if verdict(row) == "derived"]
    same = sum(row.library is True for row in derived)
    other = [row.model_type for row in derived if row.library is False]
    none = sum(row.library is None for row in derived)
    text = f"The greedy tokens are also those of transformers' `generate` with its own cache for {same} of the derived"
    text += f"; {none} cannot be generated from token ids so" if none else ""
    if other:
        text += f"; for {', '.join(other)} it gives other ones"
    return text + "."


def _line(row: Row) -> str:
    mark = {True: "yes", False: "no", None: ""}
    mixing = "" if row.mixers is None else ", ".join(row.mixers) or "none"
    reason = row.reason.replace("|", "\\|")
    return f"| {row.model_type} | {mark[row.causal]} | {mark[row.exports]} | {mixing} | {verdict(row)} | {reason} |"
