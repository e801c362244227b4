"""The summary of a case as a table for a terminal of 80 columns, and that of a whole run as Markdown."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from samples import Case

# Heading, key of the summary, how its number is written.
COLUMNS = (
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("of limit", "of_limit", "{:.2f}"),
    ("accelc is", "accelc_is_faster", "{:.2f}x"),
    ("first token (s)", "first_token_seconds", "{:.2f}"),
    ("cold start (s)", "cold_start", "{:.1f}"),
    ("second start (s)", "second_start", "{:.1f}"),
    ("same tokens", "same_tokens", "{:.0%}"),
    ("GB/s", "bandwidth", "{:.0f}"),
)


def terminal(case: Case) -> Group:
    """One case. Headings and decoders break between words; the numbers never do."""
    table = Table(title=case.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("decoder", min_width=16, overflow="fold")
    for heading, _, _ in COLUMNS:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, figures in case.summary().items():
        table.add_row(case.rows[name].title, *_numbers(figures))
    notes = [*_steps(case), *(f"{name}: {why}" for name, why in case.skipped.items())]
    return Group(table, *(Padding(Text(note), (0, 0, 0, 2)) for note in notes))


def markdown(cases: Sequence[Case], environment: dict[str, Any]) -> str:
    """A run, ready for a README: what it ran on, one table of all cases, and who was left out and why."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    changed = " with uncommitted changes" if environment["dirty"] else ""
    lines = [
        f"Batch 1, greedy, random weights, on {environment['cpu']}, {environment['capability']}; {versions}; "
        f"commit {environment['commit']}{changed}; `{environment['command']}`.",
        "",
        _line(["model", "decoder", *(heading for heading, _, _ in COLUMNS)]),
        _line(["---", "---", *("---:" for _ in COLUMNS)]),
    ]
    for case in cases:
        model = case.title
        for name, figures in case.summary().items():
            lines.append(_line([model, case.rows[name].title, *_numbers(figures)]))
            model = ""
    steps = [f"- {case.shape} {case.dtype}, {note}" for case in cases for note in _steps(case)]
    lines += ["", *steps] if steps else []
    skipped = [f"- {case.shape} {case.dtype}, {name}: {why}" for case in cases for name, why in case.skipped.items()]
    if skipped:
        lines += ["", "Not measured:", "", *skipped]
    return "\n".join(lines) + "\n"


def _steps(case: Case) -> list[str]:
    """What was measured of steps alone."""
    shares = [(row.title, row.step_of_limit) for row in case.rows.values()]
    return [f"a step of {title} alone: {share:.2f} of the limit" for title, share in shares if share is not None]


def _numbers(figures: dict[str, Any]) -> list[str]:
    return ["-" if figures[key] is None else form.format(figures[key]) for _, key, form in COLUMNS]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
