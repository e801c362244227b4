"""`accelc roofline`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from accelc.command.shared import DTYPE, MODEL, QUANTIZE, compiled, errors, named_errors

EXAMPLES = """Examples:

accelc roofline path/to/model --hardware h200 --context 2048

accelc roofline path/to/model --quantize int4 --new-tokens 16 --json"""


def roofline(
    model: MODEL,
    hardware: Annotated[str, typer.Option(help="h200, h100, a100, b200 or rtx4090.")] = "h200",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a row, or nodes of a tree.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a row, the new ones included.")] = 1024,
    dtype: DTYPE = None,
    quantize: QUANTIZE = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Model the regions of a model's step, their bytes and what they take at best on named hardware."""
    from accelc.roofline import hardware as named
    from accelc.roofline import roofline as modelled

    with named_errors():
        on = named(hardware)
        decoder = compiled(model, None, dtype, quantize, eager=True, text=False, check="off")
        with errors.status("modelling ..."):
            found = modelled(decoder.programs["step"], on, batch=batch, new=new_tokens, context=context)
    if json_out:
        typer.echo(json.dumps({"model": str(model), "quantize": quantize, **found.record()}))
    else:
        Console().print(found.table())
