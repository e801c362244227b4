"""What each quantization costs and saves, on the demo's trained model and text that it was not trained on.

    python benchmarks/quantization.py                   # trains the demo's model first where it is not in the cache
    python benchmarks/quantization.py --tokens 20000 --repeats 5

Perplexity is that of the held-out files of Python's standard library by a sliding window; calibration text is from the
training files. Speed is greedy decoding at batch 1, the configurations taking turns. Peak memory is that of a process
that loads the model's directory, quantizes and decodes (benchmarks/peak.py).
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from environment import write_results
from peak import measure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import accelc
from accelc.demo.corpus import read_corpus
from accelc.demo.settings import Settings
from accelc.demo.tokenizer import encode_files
from accelc.demo.training import Trained, trained_model
from accelc.passes.quantize.products import find_matrices

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Configuration:
    """One row of the table: its title and the options of the pass, None for the float model."""

    title: str
    options: dict[str, Any] | None


CONFIGURATIONS = (
    Configuration("fp32", None),
    Configuration("int8, row", {"scheme": "int8"}),
    Configuration("int8, group 32", {"scheme": "int8:g32"}),
    Configuration("int4, group 128", {"scheme": "int4:g128"}),
    Configuration("int4, group 128, HQQ", {"scheme": "int4:g128", "method": "hqq"}),
    Configuration("int4, group 128, AWQ", {"scheme": "int4:g128", "method": "awq"}),
    Configuration("int4, group 128, GPTQ", {"scheme": "int4:g128", "method": "gptq"}),
    Configuration("int4, groups chosen", {"scheme": "int4:auto"}),
    Configuration("int4, group 128, asymmetric", {"scheme": "int4:g128:asym"}),
    Configuration("int4, group 128, asymmetric, HQQ", {"scheme": "int4:g128:asym", "method": "hqq"}),
    Configuration("int4, group 32", {"scheme": "int4:g32"}),
    Configuration("int4, group 32, HQQ", {"scheme": "int4:g32", "method": "hqq"}),
    Configuration("int4, group 32, GPTQ", {"scheme": "int4:g32", "method": "gptq"}),
)


@dataclass
class Row:
    """What was measured of a configuration; ``bits``: of a weight, scales included, over all products' weights."""

    title: str
    bits: float = 0.0
    perplexity: float = 0.0
    loss: float = 0.0
    peak_mb: float = 0.0
    rates: list[float] = field(default_factory=list)


def main(
    tokens: Annotated[int, typer.Option(help="Held-out tokens that are scored.", min=512)] = 16_384,
    calibration_rows: Annotated[int, typer.Option(help="Calibration windows of 256 tokens.", min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Generations of each configuration.", min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, a process each.")] = True,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = RESULTS,
) -> None:
    """Measure every configuration; print a table, and write it as JSON and Markdown."""
    console = Console(highlight=False)
    settings = Settings()
    trained = trained_model(settings, console)
    corpus = read_corpus(settings.corpus_bytes)
    held_out = encode_files(trained.tokenizer, corpus.held_out.values())[:tokens]
    text = accelc.Calibration.of_text(
        encode_files(trained.tokenizer, list(corpus.train.values())[:200]), rows=calibration_rows
    )
    rows, decoders, weights = [], [], 0
    for configuration in track(CONFIGURATIONS, "compiling and scoring", console=console):
        decoder = accelc.compile(trained.model, max_length=settings.context, quantize=_pass(configuration, text))
        score = accelc.perplexity(decoder, held_out, window=512, stride=256)
        weights = weights or _weights(decoder)  # the first one is in floats
        rows.append(Row(configuration.title, _bits(decoder, weights), score.perplexity, score.loss))
        decoders.append(decoder)
    prompt = held_out[:64]
    for decoder in decoders:
        decoder.settle()
        decoder.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
    for _ in track(range(repeats), "decoding in turns", console=console):
        for row, decoder in zip(rows, decoders, strict=True):
            statistics = decoder.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True).statistics
            row.rates.append(statistics.decode_tokens_per_second)
    if memory:
        for row, configuration in track(list(zip(rows, CONFIGURATIONS, strict=True)), "memory", console=console):
            row.peak_mb = _peak(trained, configuration, text)
    console.print(_table(rows))
    _write(rows, out, console, trained)


def _pass(configuration: Configuration, text: accelc.Calibration) -> accelc.QuantizeWeights | None:
    if configuration.options is None:
        return None
    calibrated = configuration.options.get("method") in ("gptq", "awq")
    return accelc.QuantizeWeights(**configuration.options, calibration=text if calibrated else None)


def _weights(decoder: accelc.CompiledDecoder) -> int:
    """How many weights the products of a float decoder read."""
    step = decoder.programs["step"]
    return sum(step.tensors()[m.path].numel() for m in find_matrices(step).values() if m.products)


def _bits(decoder: accelc.CompiledDecoder, weights: int) -> float:
    """Bits of a weight, of all `weights` that products read: codes, scales, zeros and padding."""
    step = decoder.programs["step"]
    tensors = step.tensors()
    coded = {name.rpartition(".")[0] for name in tensors if name.endswith("quantized.codes")}
    read = [t for name, t in tensors.items() if name.rpartition(".")[0] in coded]
    read += [tensors[m.path] for m in find_matrices(step).values() if m.products]
    return sum(t.numel() * t.element_size() * 8 for t in read) / weights


def _peak(trained: Trained, configuration: Configuration, text: accelc.Calibration) -> float:
    """MB that loading, quantizing and decoding take at most."""
    calibrated = (configuration.options or {}).get("method") in ("gptq", "awq")
    found = measure(trained.path, configuration.options, 256, calibration=text.tokens if calibrated else None)
    return found["peak"] / 1e6


def _table(rows: list[Row]) -> Table:
    table = Table(title="weights in few bits", title_justify="left")
    table.add_column("weights")
    for heading in ("bits a weight", "perplexity", "rise", "tokens/s", "peak MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.title, *_figures(row, rows[0]))
    return table


def _figures(row: Row, base: Row) -> list[str]:
    rise = "-" if row is base else f"{row.perplexity / base.perplexity - 1:+.2%}"
    peak = f"{row.peak_mb:.0f}" if row.peak_mb else "-"
    return [f"{row.bits:.2f}", f"{row.perplexity:.3f}", rise, f"{median(row.rates):.0f}", peak]


def _write(rows: list[Row], out: Path, console: Console, trained: Trained) -> None:
    lines = ["| weights | bits a weight | perplexity | rise | tokens/s | peak MB |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {row.title} | {' | '.join(_figures(row, rows[0]))} |" for row in rows]
    found = [asdict(row) for row in rows]
    path = write_results(out, "quantization", lines, model=trained.record, rows=found)
    console.print(f"Written: {path} and .md next to it", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(typer.run(main))
