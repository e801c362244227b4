"""Peak memory of loading, quantizing and decoding a model's directory, beside the bytes that have to be there.

    python benchmarks/memory.py                       # the Llama-3.2-1B shape in int8 and int4
    python benchmarks/memory.py --shape 160m --scheme int4:g32

Two processes for each scheme, the second with the programs that the first one left in the cache; benchmarks/peak.py
says what counts.
"""

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from peak import measure
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, make_model


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "1b",
    scheme: Annotated[list[str] | None, typer.Option(help="Schemes; default: int8 and int4.")] = None,
    max_length: Annotated[int, typer.Option(min=32)] = 1024,
    work: Annotated[Path | None, typer.Option(help="Keep weights here; default: deleted.")] = None,
) -> None:
    """Print peak bytes by scheme, and their ratio to the weights' and the cache's."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (work or Path(scratch)) / f"{shape}-bf16-{max_length}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_model(SHAPES[shape], "bf16", max_length, folder)
        table = Table(title=f"{shape}, context {max_length}: MB", title_justify="left")
        for heading in ("scheme", "start", "weights", "cache", "peak", "peak / both", "seconds"):
            table.add_column(heading, justify="right")
        for text, start in itertools.product(scheme or ("int8", "int4"), ("first", "second")):
            options = {"scheme": text, "head": "int8"}
            found = measure(folder, options, max_length, cache=Path(scratch) / f"cache-{text.replace(':', '-')}")
            both = found["weights"] + found["cache"]
            megabytes = (f"{found[key] / 1e6:.0f}" for key in ("weights", "cache", "peak"))
            table.add_row(text, start, *megabytes, f"{found['peak'] / both:.2f}", f"{found['seconds']:.1f}")
        console.print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
