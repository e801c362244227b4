"""What commands share: arguments, models from directories, errors as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

import accelc
from accelc.ir.errors import AccelcError, InputError

errors = Console(stderr=True, highlight=False)

OPTIONAL = ("transformers", "tokenizers", "accelerate")
"""Packages that models in directories and training need, and nothing else."""

QUANTIZE = Annotated[
    str | None, typer.Option(help="Keep weights in few bits: int8, int4, int4:g64:asym ...; default: as stored.")
]
MODEL = Annotated[Path, typer.Argument(help="Directory with config.json, safetensors and a tokenizer.")]
DTYPE = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]


def dtype_of(name: str | None) -> Any:
    """The torch dtype of a name; None for None. Raises InputError."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
    if name not in dtypes:
        raise InputError(f"dtype is {name!r}", remedy="Use float32, bfloat16 or float16.")
    return dtypes[name]


def compiled(
    model: Path,
    max_length: int | None,
    dtype: str | None,
    quantize: str | None,
    eager: bool,
    *,
    text: bool = True,
    check: Literal["quick", "off"] = "quick",
) -> Any:
    """The decoder of a directory; `text`: it needs a tokenizer."""
    from transformers.utils import logging as transformers_logging

    from accelc.compiler import load_model_for, load_tokenizer, quantization

    kept_in = dtype_of(dtype)
    tokenizer = load_tokenizer(model)
    if text and tokenizer is None and (model / "config.json").is_file():
        raise InputError(
            f"no tokenizer in {model}", remedy="Save one beside the model: tokenizer.save_pretrained(directory)."
        )
    transformers_logging.disable_progress_bar()
    with errors.status("loading the model ...") as status:
        loaded, left = load_model_for(model, quantization(quantize), dtype=kept_in)
        return accelc.compile(
            loaded,
            max_length=max_length,
            tokenizer=tokenizer,
            quantize=left,
            backend="eager" if eager else "native",
            check=check,
            progress=lambda stage: status.update(f"compiling: {stage} ..."),
        )


@contextmanager
def named_errors() -> Iterator[None]:
    """Our own errors, and a missing package, end the command with a text, not with a traceback."""
    try:
        yield
    except AccelcError as error:
        errors.print(f"[red]{type(error).__name__}[/red]: ", end="")
        errors.print(str(error), markup=False)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        errors.print(f"{error.name} is not installed: pip install transformers", markup=False)
        raise typer.Exit(1) from None
