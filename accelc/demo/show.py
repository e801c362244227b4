"""The demo's course: model, stream, equality, table."""

import time
from dataclasses import replace

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

import accelc
from accelc.demo.compare import first_difference, table
from accelc.demo.contenders import accelc_decoder, interleave, make_ready, transformers_eager, transformers_inductor
from accelc.demo.quantized import show_quantized
from accelc.demo.settings import Settings
from accelc.demo.speculative import show_speculation
from accelc.demo.training import Trained, trained_model
from accelc.runtime.decoder import Decoder


def show(prompt: str, new_tokens: int, repeats: int, steps: int | None) -> None:
    """Run the demo; exits with status 1 when the tokens differ other than at a tie of logits."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    console = Console(highlight=False)
    settings = Settings() if steps is None else replace(Settings(), steps=steps)
    trained = trained_model(settings, console)
    if trained.cached:
        console.print(
            f"Model from the cache, trained {trained.record['settings']['steps']} steps, "
            f"held-out loss {trained.record['held_out_loss']:.3f}: {trained.path}"
        )
    ids = trained.tokenizer(prompt, return_tensors="pt")["input_ids"]  # [1, T]
    max_length = min(settings.context, ids.shape[1] + new_tokens)
    if max_length < ids.shape[1] + new_tokens:
        raise typer.BadParameter(
            f"the prompt has {ids.shape[1]} tokens and the model {settings.context} positions: "
            f"at most {settings.context - ids.shape[1]} new tokens"
        )

    started = time.perf_counter()
    with console.status("compiling ...") as status:
        decoder = accelc.compile(
            trained.model, max_length=max_length, progress=lambda stage: status.update(f"compiling: {stage} ...")
        )
    ours = make_ready("accelc", accelc_decoder(decoder), started, ids, new_tokens)
    _stream(trained, decoder, ids, new_tokens, console)

    console.print(f"Comparing, {torch.get_num_threads()} threads, {new_tokens} new tokens ...")
    peers = {
        "transformers, eager": transformers_eager,
        "Inductor, static cache": transformers_inductor,
    }
    contenders = [
        make_ready(name, build(trained.model), time.perf_counter(), ids, new_tokens) for name, build in peers.items()
    ]
    contenders.append(ours)
    interleave(contenders, ids, new_tokens, repeats)
    same = _report_tokens(trained, ids, contenders[0].samples[0].tokens, contenders[-1].samples[0].tokens, console)
    console.print(table(contenders, f"{trained.record['parameters'] / 1e6:.1f} M parameters, fp32, batch 1"))
    decoders = show_quantized(trained, settings, decoder, ids, new_tokens, repeats, console)
    chosen = {name: decoders[name] for name in ("fp32", "int4:g64")}
    if not show_speculation(chosen, ids, new_tokens, repeats, console) or not same:
        raise typer.Exit(1)


def _stream(trained: Trained, decoder: Decoder, ids: torch.Tensor, new_tokens: int, console: Console) -> None:
    console.rule("prompt and its continuation, as it is decoded")
    # Written as it is: code is full of brackets that rich would take for markup, and lines that it would wrap.
    console.out(trained.tokenizer.decode(ids[0]), end="", highlight=False)
    for event in decoder.stream(ids, max_new_tokens=new_tokens, tokenizer=trained.tokenizer):
        console.out(event.text, end="", highlight=False)
    console.out()
    console.rule()


def _report_tokens(
    trained: Trained, ids: torch.Tensor, expected: tuple[int, ...], actual: tuple[int, ...], console: Console
) -> bool:
    """Say whether accelc's tokens are those of transformers' greedy `generate`; a tie of two logits counts as equal."""
    difference = first_difference(trained.model, ids, expected, actual)
    if difference is None:
        console.print(f"[green]All {len(expected)} tokens equal those of transformers' greedy generate.[/green]")
        return True
    words = [trained.tokenizer.decode([token]) for token in (difference.expected, difference.actual)]
    verdict = "[yellow]a tie within rounding" if difference.is_tie else "[red]NOT a tie"
    console.print(
        f"{verdict}:[/] tokens part at {difference.index} of {len(expected)}, {words[0]!r} against {words[1]!r}; "
        f"logits differ by {difference.margin:.2e} there"
    )
    return difference.is_tie
