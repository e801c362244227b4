"""`accelc tune-tree`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from accelc.command.shared import named_errors

EXAMPLES = """Examples:

accelc generate path/to/model --heads heads.safetensors --prompt "def " --statistics s.json

accelc tune-tree s.json --out tree.json

accelc generate path/to/model --heads heads.safetensors --tree tree.json --prompt "def " """


def tune_tree(
    statistics: Annotated[list[Path], typer.Argument(help="Files that generate --statistics wrote.")],
    nodes: Annotated[
        int | None, typer.Option(help="Nodes of the tree, the root included; default: by the measured step times.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the tree goes, as JSON.")] = Path("tree.json"),
) -> None:
    """Solve a draft tree from recorded statistics: the nodes that are accepted most often, as many as pay."""
    from accelc.arguments import check_output
    from accelc.runtime.speculation.statistics import SpeculationStatistics
    from accelc.runtime.speculation.tuning import tune_tree as solve
    from accelc.speculation_report import render_tuned

    with named_errors():
        check_output(out)
        tuned = solve([SpeculationStatistics.load(path) for path in statistics], nodes)
        tuned.tree.save(out)
    Console().print(render_tuned(tuned))
    typer.echo(f"Written: {out}")
