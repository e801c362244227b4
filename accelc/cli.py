"""The command line: what `accelc` does; the commands that have a file of their own are in `accelc.command`."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import accelc
from accelc.command import DTYPE, MODEL, QUANTIZE, compiled, drafting, errors, named_errors, roofline, training, trees
from accelc.demo import main as demo

EXAMPLES = """Examples, with a directory written by save_pretrained:

accelc generate path/to/model --prompt "def main():" --max-new-tokens 64

accelc generate path/to/model --temperature 0.8 --top-p 0.95 --seed 1 < prompt.txt

accelc generate path/to/model --prompt "Q: why?" --stop "Q:" --report"""

app = typer.Typer(
    help="Turn the plain forward of a causal language model into a fast autoregressive decoder.",
    epilog="Try accelc demo first, or accelc doctor where something does not work. In Python: accelc.compile(model).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo)
app.command("train-heads", epilog=training.EXAMPLES)(training.train_heads)
app.command("tune-tree", epilog=trees.EXAMPLES)(trees.tune_tree)
app.command("roofline", epilog=roofline.EXAMPLES)(roofline.roofline)

EVAL_EXAMPLES = """Examples:

accelc eval path/to/model book.txt

accelc eval path/to/model *.py --quantize int4:g64 --window 512 --max-tokens 20000"""


def show_version(wanted: bool) -> None:
    """Print the version and end, for ``--version``."""
    if wanted:
        typer.echo(f"accelc {accelc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


@app.command(epilog=EXAMPLES)
def generate(
    model: MODEL,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; '-' or nothing reads standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest sequence; default: the model's, up to 4096.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above 0 samples, and the filters below apply.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Keep the likeliest tokens that together reach this probability; 1 keeps all.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the likeliest one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen before.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes sampling reproducible; default: another one each time.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the continuation before it; may be given several times.")
    ] = None,
    dtype: DTYPE = None,
    quantize: QUANTIZE = None,
    draft: Annotated[
        str | None, typer.Option(help="Speculate with this drafter: prompt_lookup or token_recycling.")
    ] = None,
    draft_model: Annotated[
        Path | None, typer.Option(help="Speculate with the smaller model in this directory.")
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="Speculate with these heads, from accelc train-heads.")] = None,
    tree: Annotated[
        str | None, typer.Option(help="Tree of the drafts: a file of accelc tune-tree, or dynamic (heads alone).")
    ] = None,
    accept: Annotated[
        str | None, typer.Option(help="Acceptance rule: matching, rejection (both lossless) or typical (LOSSY).")
    ] = None,
    draft_nodes: Annotated[
        int | None, typer.Option(help="Most nodes of a tree that a step verifies; default: chosen by measurement.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Write statistics of speculation here, for tune-tree; a plot goes next to it.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Run the step node by node instead of compiling it.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Print what compiling did, and statistics, to stderr.")
    ] = False,
) -> None:
    """Continue a prompt with the model in a directory; the text streams to standard output."""
    from accelc.arguments import check_output
    from accelc.compiler import check_draft
    from accelc.ir.errors import EmptyPromptError, InputError, PromptTooLongError
    from accelc.runtime.text import encode
    from accelc.speculation_report import plot_statistics
    from accelc.texts import read_texts

    with named_errors():
        sampling = accelc.SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        if max_length is not None and max_new_tokens >= max_length:
            raise PromptTooLongError(f"{max_new_tokens} new tokens leave no room for a prompt in {max_length}")
        if sampling.greedy and (seed is not None or top_k or top_p != 1 or min_p):
            notice = "At temperature 0 the likeliest token is taken: the seed and the filters have no effect."
            errors.print(notice, soft_wrap=True)
        drafter = drafting.drafter_of(draft, draft_model, heads, tree)
        if statistics is not None and drafter is None:
            raise InputError("--statistics without a drafter", remedy="Give --draft, --draft-model or --heads.")
        if statistics is not None:
            check_output(statistics, plot=True)
        check_draft(drafter, accept, accelc.Exactness.LOSSY)
        decoder = compiled(model, max_length, dtype, quantize, eager)
        if report:
            errors.print(decoder.renderable(), width=None if errors.is_terminal else 120)
        text = read_texts([Path("-")]) if prompt in (None, "-") else prompt
        if not text:
            raise EmptyPromptError("the prompt is empty", remedy='Give --prompt "some text", or pipe text in.')
        ids = encode(decoder.tokenizer, text)
        with decoder.stream(
            [ids],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_strings=tuple(stop or ()),
            draft=drafter,
            accept=accept,
            draft_nodes=draft_nodes,
        ) as stream:
            for event in stream:
                sys.stdout.write(event.text)
                sys.stdout.flush()
            sys.stdout.write("\n")
            figures = stream.result.statistics
            if report:
                errors.print(str(figures))
                if figures.speculation is not None:
                    errors.print(figures.speculation.table())
            if statistics is not None and figures.speculation is not None:
                figures.speculation.save(statistics)
                plot_statistics(figures.speculation, statistics.with_suffix(".svg"))


@app.command("eval", epilog=EVAL_EXAMPLES)
def evaluate(
    model: MODEL,
    texts: Annotated[list[Path], typer.Argument(help="Text files, read as one text; '-' reads standard input.")],
    window: Annotated[int | None, typer.Option(min=2, help="Tokens of a window; default: up to 1024.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; default: half a window.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use the first tokens of the text alone.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest sequence; default: the model's, up to 4096.")
    ] = None,
    dtype: DTYPE = None,
    quantize: QUANTIZE = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the perplexity of a model on text, as it is or with weights in few bits."""
    from accelc.command.progress import Bars
    from accelc.evaluate import perplexity
    from accelc.runtime.text import encode
    from accelc.texts import read_texts

    with named_errors():
        text = read_texts(texts)
        decoder = compiled(model, max_length, dtype, quantize, eager=False)
        ids = encode(decoder.tokenizer, text)[:max_tokens]
        with Bars(transient=True) as bars:
            result = perplexity(
                decoder,
                ids,
                window=window,
                stride=stride,
                progress=lambda done, total: bars("windows", done, total),
            )
    if json_out:
        typer.echo(json.dumps({**asdict(result), "perplexity": result.perplexity, "model": str(model),
                               "quantize": quantize}))  # fmt: skip
    else:
        typer.echo(str(result))


@app.command("plan-quantize")
def plan_quantize(
    model: MODEL,
    texts: Annotated[list[Path], typer.Argument(help="Calibration text files, read as one text.")],
    max_bytes: Annotated[float | None, typer.Option(help="Bytes that all weights may take.")] = None,
    max_rise: Annotated[
        float | None, typer.Option(help="Tolerated rise of the perplexity, 0.01 for one percent.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the plan goes; a plot goes next to it.")] = Path("plan.json"),
    rows: Annotated[int, typer.Option(min=1, help="Pieces of text that the program is run on.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 256,
    dtype: DTYPE = None,
) -> None:
    """Choose scheme and group of each weight by measured sensitivity, for a size or a tolerated loss.

    Use the plan by `accelc.compile(model, quantize=QuantizationPlan.load("plan.json").to_pass())`.
    """
    from accelc.arguments import check_output
    from accelc.checkpoints import quantization_of
    from accelc.command.progress import Bars
    from accelc.ir.errors import InputError
    from accelc.passes.quantize.budget import plan_quantization
    from accelc.quantization_report import plot_plan, render_plan
    from accelc.runtime.text import encode
    from accelc.texts import read_texts

    with named_errors():
        if (max_bytes is None) == (max_rise is None):
            raise InputError("a plan needs one budget", remedy="Give --max-bytes or --max-rise, and not both.")
        if max_rise is not None and not 0 < max_rise < math.inf:
            raise InputError(f"--max-rise is {max_rise}", remedy="Give a rise above 0, such as 0.01 for one percent.")
        if max_bytes is not None and not 0 < max_bytes < math.inf:
            raise InputError(f"--max-bytes is {max_bytes:g}", remedy="Give the bytes that all weights may take.")
        check_output(out, plot=True)
        text = read_texts(texts)
        if (model / "config.json").is_file() and quantization_of(model) is not None:
            raise InputError(f"the model in {model} is quantized already", remedy="Plan for its float model.")
        decoder = compiled(model, length, dtype, None, eager=False)
        calibration = accelc.Calibration.of_text(encode(decoder.tokenizer, text), rows=rows, length=length)
        with Bars(transient=True) as bars:
            plan = plan_quantization(
                decoder.programs["step"],
                calibration,
                max_bytes=max_bytes,
                max_loss=None if max_rise is None else math.log1p(max_rise),
                progress=bars,
            )
        plan.save(out)
        plot = plot_plan(plan, out.with_suffix(".svg"))
    Console().print(render_plan(plan))
    typer.echo(f"Written: {out}" + (f" and {plot}" if plot else " (no plot: matplotlib is not installed)"))


@app.command()
def doctor() -> None:
    """Check what this machine can do: versions, C++ compiler, kernels, and a tiny model compiled and compared."""
    from accelc.doctor import diagnose

    if not diagnose(Console()):
        raise typer.Exit(1)


@app.command()
def passes() -> None:
    """List the passes that are installed, with what they promise."""
    from rich.table import Table

    from accelc.passes.registry import find_pass, known_passes

    table = Table("pass", "guarantee", "what it does")
    for name in known_passes():
        cls = find_pass(name)
        exactness = cls.exactness if not isinstance(cls.exactness, property) else "depends on its options"
        table.add_row(name, str(exactness), _first_sentence(cls.__doc__ or ""))
    Console().print(table)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


def main() -> None:
    """Entry point of the console script."""
    app()
