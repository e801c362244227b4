"""Decoding on a GPU, end to end: accelc beside transformers on the same random weights, as a share of the bandwidth
that is read in the same run.

    python benchmarks/gpu.py --shapes 1b,8b --dtypes bf16,int8,int4

*Of the limit* counts the bytes that a step must read (weights, and the cache of the tokens so far) over the time of a
token. *Node by node* is accelc without its graph, one launch after another.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from environment import write_results
from quantized_gemm import bandwidth
from rich.console import Console
from rich.table import Table
from shapes import DTYPES, SCHEMES, SHAPES, Shape
from transformers import LlamaForCausalLM

import accelc

RESULTS = Path(__file__).parent / "results"
HEADS = ("model", "decoder", "batch", "context", "ms a token", "tokens/s", "of the limit", "first token (s)")
PEERS = ("node by node", "transformers", "transformers, static cache")


@dataclass(frozen=True)
class Sample:
    """``milliseconds`` a token, the median of runs; ``first`` token: seconds, the prompt included."""

    shape: str
    dtype: str
    decoder: str
    batch: int
    context: int
    milliseconds: float
    of_limit: float
    first: float
    compile_seconds: float


def model_of(shape: Shape, max_length: int) -> LlamaForCausalLM:
    """Random bf16 weights, made on the GPU."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(shape.config(max_length)).eval()
    finally:
        torch.set_default_dtype(before)


Run = Callable[[torch.Tensor, int], tuple[float, float]]
"""run(prompt [B, T], new tokens): seconds a token after the first, seconds to the first."""


def accelc_runs(model: LlamaForCausalLM, dtype: str, max_length: int) -> Iterator[tuple[str, Run, float]]:
    started = time.perf_counter()
    scheme = SCHEMES.get(dtype)
    quantize = None if scheme is None else accelc.QuantizeWeights(scheme=scheme[0], head=scheme[1])
    decoder = accelc.compile(model, max_length=max_length, quantize=quantize, check="off", cache=False)
    compiled = time.perf_counter() - started

    def generate(prompt: torch.Tensor, new: int) -> tuple[float, float]:
        found = decoder.generate(prompt, max_new_tokens=new, ignore_eos=True).statistics
        return (found.total_seconds - found.first_token_seconds) / (new - 1), found.first_token_seconds

    def append(prompt: torch.Tensor, new: int) -> tuple[float, float]:
        begun = time.perf_counter()
        with decoder.start(prompt) as session, torch.inference_mode():
            tokens = session.logits.argmax(-1)
            tokens.tolist()
            first = time.perf_counter() - begun
            for _ in range(new - 1):
                tokens = session.append(tokens[:, None])[:, -1].argmax(-1)
                tokens.tolist()
        return (time.perf_counter() - begun - first) / (new - 1), first

    yield "accelc", generate, compiled
    yield "node by node", append, compiled


def transformers_run(model: LlamaForCausalLM, static: bool) -> Run:
    options = {"cache_implementation": "static"} if static else {}

    def generate(prompt: torch.Tensor, new: int) -> tuple[float, float]:
        def timed(count: int) -> float:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with torch.no_grad():
                model.generate(
                    prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
                    attention_mask=torch.ones_like(prompt), **options,
                )  # fmt: skip
            torch.cuda.synchronize()
            return time.perf_counter() - begun

        first = timed(2)  # a step is in it: static caches compile that of one token
        return (timed(new) - first) / (new - 2), first

    return generate


def measure(
    shape: Shape, dtype: str, batches: list[int], contexts: list[int], new: int, repeats: int, peers: set[str],
    rate: float, say: Callable[[str], None],
) -> Iterator[Sample]:  # fmt: skip
    """Every decoder of one model."""
    max_length = max(contexts) + new + 1
    model = model_of(shape, max_length)
    runs = [run for run in accelc_runs(model, dtype, max_length) if run[0] == "accelc" or run[0] in peers]
    if dtype not in SCHEMES:
        for name, static in ((PEERS[1], False), (PEERS[2], True)):
            if name in peers:
                runs.append((name, transformers_run(model, static), 0.0))
    for batch in batches:
        for context in contexts:
            generator = torch.Generator(device="cuda").manual_seed(1)
            prompt = torch.randint(0, shape.vocabulary, (batch, context), device="cuda", generator=generator)
            limit = (
                shape.bytes_per_token(dtype, 0)
                + batch * (shape.bytes_per_token(dtype, context + new / 2) - shape.bytes_per_token(dtype, 0))
            ) / rate
            for name, run, compiled in runs:
                say(f"{shape.name} {dtype}, {name}, batch {batch}, context {context}")
                run(prompt, new)
                found = [run(prompt, new) for _ in range(repeats)]
                each, first = (statistics.median(times) for times in zip(*found, strict=True))
                yield Sample(
                    shape.name, dtype, name, batch, context, each * 1e3, limit / each, first, compiled
                )  # fmt: skip
    del runs, model
    gc.collect()
    torch.cuda.empty_cache()


def write(samples: list[Sample], out: Path, gpu: str, rate: float) -> Path:
    """The samples so far, as JSON and Markdown; the JSON's path."""
    lines = [f"On {gpu}; a copy moves {rate / 1e9:.0f} GB/s.", "", "| " + " | ".join(HEADS) + " |", "|---" * 8 + "|"]
    lines += ["| " + " | ".join(cells(s)) + " |" for s in samples]
    return write_results(out, "gpu", lines, gpu=gpu, bandwidth=rate, samples=[asdict(s) for s in samples])


def table(samples: list[Sample]) -> Table:
    made = Table(title="Decoding", title_justify="left")
    for title in HEADS:
        made.add_column(title, justify="left" if title in ("model", "decoder") else "right", no_wrap=True)
    for s in samples:
        made.add_row(*cells(s))
    return made


def cells(s: Sample) -> list[str]:
    each = s.milliseconds
    return [f"{s.shape} {s.dtype}", s.decoder, str(s.batch), str(s.context), f"{each:.3f}",
            f"{s.batch * 1e3 / each:.0f}", f"{s.of_limit:.2f}", f"{s.first:.3f}"]  # fmt: skip


def main(
    shapes: Annotated[str, typer.Option(help="Separated by commas: 160m, 1b, 8b.")] = "1b",
    dtypes: Annotated[str, typer.Option(help="Separated by commas: bf16, int8, int4.")] = "bf16,int8,int4",
    batches: Annotated[str, typer.Option(help="Separated by commas.")] = "1",
    contexts: Annotated[str, typer.Option(help="Tokens of the prompt, separated by commas.")] = "128",
    new_tokens: Annotated[int, typer.Option(help="Tokens that are decoded.", min=8)] = 128,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.", min=1)] = 3,
    peers: Annotated[str, typer.Option(help=f"Of {'; '.join(PEERS)}; separated by semicolons.")] = ";".join(PEERS),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure, print a table, and write the samples to a file."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("No CUDA device is here.")
        raise typer.Exit(1)
    for name in dtypes.split(","):
        if name not in DTYPES or name == "fp32":
            raise typer.BadParameter(f"{name}: use bf16, int8 or int4")
    for name in shapes.split(","):
        if name not in SHAPES:
            raise typer.BadParameter(f"{name}: known are {', '.join(SHAPES)}")
    rate = bandwidth()
    gpu = torch.cuda.get_device_name()
    console.print(f"{gpu}: a copy moves {rate / 1e9:.0f} GB/s")
    samples: list[Sample] = []
    for shape in shapes.split(","):
        for dtype in dtypes.split(","):
            for sample in measure(
                SHAPES[shape], dtype, [int(b) for b in batches.split(",")], [int(c) for c in contexts.split(",")],
                new_tokens, repeats, set(peers.split(";")), rate, console.print,
            ):  # fmt: skip
                samples.append(sample)
                console.print("  " + "  ".join(cells(sample)[4:]))
                path = write(samples, out, gpu, rate)  # what was measured is kept if the run is cut off
    console.print(table(samples))
    console.print(f"Written: {path.name} and .md next to it")


if __name__ == "__main__":
    typer.run(main)
