"""`accelc train-heads`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from accelc.command.shared import DTYPE, MODEL, dtype_of, named_errors

EXAMPLES = """Examples:

accelc train-heads path/to/model *.txt --out heads.safetensors

accelc train-heads path/to/model chats.jsonl --kind hydra --prefix --steps 5000 --distill

torchrun --nproc-per-node 8 --no-python accelc train-heads path/to/model corpus.jsonl"""


def train_heads(
    model: MODEL,
    texts: Annotated[list[Path], typer.Argument(help="Text files, or .jsonl files with one object a line.")],
    out: Annotated[Path, typer.Option(help="Where the heads go.")] = Path("heads.safetensors"),
    kind: Annotated[str, typer.Option(help="medusa, or hydra: heads that read the guesses before theirs.")] = "hydra",
    heads: Annotated[int, typer.Option(help="Heads: how many tokens beyond the next are guessed.")] = 4,
    layers: Annotated[int, typer.Option(help="Residual blocks of a head.")] = 1,
    prefix: Annotated[bool, typer.Option("--prefix", help="A decoder layer in front of the heads (Hydra++).")] = False,
    loss: Annotated[
        str | None,
        typer.Option(
            help="labels: the text's tokens; teacher: the model's distribution; default: teacher with --prefix."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    window: Annotated[int, typer.Option(help="Tokens of a training row.")] = 256,
    rows: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches of an update.")] = 1,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Texts that accuracies are measured on; default: a part of the others.")
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Train on what the model itself says to the beginnings of the texts.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of what it says, with --distill.")] = 0.7,
    text_key: Annotated[str, typer.Option(help="Field of JSONL objects that holds the text.")] = "text",
    precision: Annotated[str | None, typer.Option(help="no (fp32), bf16 or fp16; default: by the machine.")] = None,
    save_every: Annotated[int, typer.Option(help="Updates from one checkpoint to the next.")] = 100,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an unfinished training, and write over a finished one.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the rows, and of what the model says.")] = 0,
    dtype: DTYPE = None,
) -> None:
    """Train draft heads behind a frozen model; a training that was cut off goes on when it is called again."""
    with named_errors():
        from accelc.command.progress import Bars
        from accelc.compiler import load_model_for, load_tokenizer
        from accelc.heads.corpus import read_documents, windows_of
        from accelc.heads.training import TrainSettings, training_device
        from accelc.heads.training import train_heads as train
        from accelc.ir.errors import InputError
        from accelc.runtime.speculation.statistics import rates_table

        settings = TrainSettings(
            kind=kind, heads=heads, layers=layers, prefix=prefix, loss=loss, steps=steps, window=window, rows=rows,
            accumulate=accumulate, rate=rate, precision=precision, save_every=save_every, seed=seed,
        )  # fmt: skip
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise InputError(f"no tokenizer in {model}", remedy="Save one beside the model.")
        windows = windows_of(tokenizer, read_documents(texts, text_key), window)
        kept = windows_of(tokenizer, read_documents(held_out, text_key), window) if held_out else None
        loaded, _ = load_model_for(model, None, dtype=dtype_of(dtype))
        loaded.to(training_device())
        if distill:
            windows = _said_by(loaded, windows, window, temperature, seed)
        with Bars() as bars:
            file = train(
                loaded, windows, settings, out, held_out=kept, restart=restart,
                progress=lambda done, total, loss: bars("training", done, total, f"loss {loss:.3f}"),
            )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        title = "right on held-out text, by head (down) and rank"
        Console().print(rates_table(title, "head", file.accuracy))
        typer.echo(f"Written: {out}" if bars.told else f"{out} is from such a training: nothing was left to do.")


def _said_by(model: Any, windows: Any, length: int, temperature: float, seed: int) -> Any:
    import accelc
    from accelc.command.progress import Bars
    from accelc.heads.corpus import own_samples

    decoder = accelc.compile(model, max_length=length)
    with Bars() as bars:
        return own_samples(
            decoder, windows, temperature=temperature, seed=seed, rows=16,
            progress=lambda done, total: bars("samples", done, total),
        )  # fmt: skip
