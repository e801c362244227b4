"""Sweep over transformers' causal language model types: what can be derived, and what stands in the way.

python benchmarks/families.py                        # all types, writes docs/families.md and a JSON file
python benchmarks/families.py --only llama,gpt2      # a few, printed
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from environment import describe
from family_models import registered_types
from family_probe import Row
from family_report import summary, verdict, write_markdown
from family_sweep import sweep
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"


def main(
    only: Annotated[str, typer.Option(help="Comma-separated model types; all when empty.")] = "",
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds a type may take.")] = 600.0,
    derive: Annotated[bool, typer.Option(help="Compile and check; off: stop after export.")] = True,
    resume: Annotated[bool, typer.Option(help="Keep the rows that the JSON file has, and try the others.")] = False,
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
    table: Annotated[Path, typer.Option(help="Where the table of a whole sweep goes.")] = ROOT / "docs" / "families.md",
) -> None:
    """Try every registered causal language model type at a small size and record how far it comes."""
    known = registered_types()
    chosen = [name.strip() for name in only.split(",") if name.strip()] or known
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise typer.BadParameter(f"not registered: {', '.join(unknown)}", param_hint="--only")
    console = Console()
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = [row for row in _load(results) if row.model_type in chosen] if resume else []
    done = {row.model_type for row in rows}
    chosen = [name for name in chosen if name not in done]
    here = describe()
    commit = here["commit"] + " with changes" * here["dirty"]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=len(chosen))
        for row in sweep(chosen, jobs=jobs, timeout=timeout, derive=derive):
            row.commit = commit
            rows.append(row)
            rows.sort(key=lambda row: row.model_type)
            _save(rows, results)  # after every row: a sweep takes long, and may be interrupted and resumed
            progress.console.print(f"{row.model_type:28} {verdict(row):26} {row.seconds:6.1f} s", highlight=False)
            progress.update(task, advance=1, description=row.model_type)
    console.print(summary(rows), highlight=False)
    if only:
        for row in rows:
            console.print(asdict(row))
    else:
        write_markdown(rows, table, len(known))
        console.print(f"wrote {results} and {table}")
    if any(verdict(row) == "silently wrong" for row in rows):
        raise typer.Exit(1)


def _save(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _load(path: Path) -> list[Row]:
    return [Row(**fields) for fields in json.loads(path.read_text())] if path.is_file() else []


if __name__ == "__main__":
    typer.run(main)
