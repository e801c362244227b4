"""What speculation gives on the demo's trained model and text that it was not trained on.

    python benchmarks/speculation.py                     # trains what is not in the cache first, some ten minutes
    python benchmarks/speculation.py --batch 1 --repeats 5 --prompts 6

Every way decodes the same held-out prompts, the ways taking turns: plain, and with each drafter, here and (where it has
a counterpart: batch 1) in transformers. Rates are medians over turns. Tokens a step count the one behind the accepted
drafts: as decoded, where plain steps are among them when those are faster, and where every step verifies all nodes.
Heads (Medusa, Hydra, Hydra++) and the second model are trained on the text that the demo's model was trained on, once.
The curve gives the time of a verifying step by its number of nodes, on which the choice of a tree rests.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from environment import write_results
from overhead import Overhead, measure_speculation
from rich.console import Console
from rich.progress import track
from rich.table import Table

import accelc
from accelc.demo.corpus import read_corpus
from accelc.demo.settings import Settings
from accelc.demo.tokenizer import encode_files
from accelc.demo.training import Trained, trained_model
from accelc.heads.drafters import drafter_for
from accelc.heads.training import TrainSettings, train_heads
from accelc.runtime.speculation.draft import Drafter
from accelc.runtime.speculation.statistics import SpeculationStatistics
from accelc.runtime.speculation.trees import LIMIT, RECYCLING, Tree
from accelc.runtime.speculation.tuning import merged_accuracy

RESULTS = Path(__file__).parent / "results"
DRAFTERS: dict[str, Drafter] = {
    "prompt lookup, 4": accelc.PromptLookup(tokens=4),
    "prompt lookup, 10": accelc.PromptLookup(tokens=10),
    "token recycling, 6 of its nodes": accelc.TokenRecycling(
        Tree.of_paths([(0,), (1,), (0, 0), (2,), (0, 1), (0, 0, 0)])
    ),
    "token recycling, 16 of its nodes": accelc.TokenRecycling(RECYCLING.cut(17)),
    "token recycling, all 80": accelc.TokenRecycling(),
}
HEADS = TrainSettings(heads=4, steps=600, rate=1e-2, save_every=10**6)
KINDS: dict[str, dict[str, object]] = {
    "medusa": {"kind": "medusa"},
    "hydra": {"kind": "hydra"},
    "hydra++": {"kind": "hydra", "prefix": True},
}
CURVE = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)

Run = Callable[[list[torch.Tensor], int], tuple[int, float, float]]
"""prompts, new tokens -> new tokens in all, seconds after the first, mean accepted length."""


@dataclass
class Row:
    """One way of decoding at one batch and temperature."""

    way: str
    batch: int
    temperature: float
    rates: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    step_us: dict[str, float] = field(default_factory=dict)
    """Of one speculative step, by part: the last turn's mean."""
    whole: float | None = None
    """Tokens a step where every step verifies all nodes of the drafter."""
    accuracy: list[list[float]] = field(default_factory=list)
    """By depth and rank, there: how often a candidate below an accepted path was right."""

    @property
    def rate(self) -> float:
        return median(self.rates)


def main(
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; default: 1 and 4.", min=1)] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Temperatures; default: 0 and 0.8.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out prompts, in batches.", min=1)] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(help="Turns of each way.", min=1)] = 3,
    transformers: Annotated[bool, typer.Option(help="Measure transformers' counterparts too.")] = True,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = RESULTS,
) -> None:
    """Measure every way; print a table, and write it as JSON and Markdown."""
    console = Console(highlight=False)
    settings = Settings()
    trained = trained_model(settings, console)
    held_out = encode_files(trained.tokenizer, read_corpus(settings.corpus_bytes).held_out.values())
    drafters = DRAFTERS | trained_drafters(trained, settings, console)
    texts = list(held_out[: prompts * 7 * prompt_tokens].view(prompts, -1)[:, :prompt_tokens])
    decoder = accelc.compile(trained.model, max_length=prompt_tokens + new_tokens)
    # One for each drafter, as one would have: what it learned about times and drafts is its own.
    decoders = {name: accelc.compile(trained.model, max_length=decoder.max_length) for name in drafters}
    decoders["plain"] = decoder
    rows, runs = [], []
    for size in batch or [1, 4]:
        for heat in [0.0, 0.8] if temperature is None else temperature:
            for way, run in ways(decoders, trained, drafters, heat, transformers and size == 1).items():
                rows.append(Row(way, size, heat))
                runs.append(run)
    for row, run in track(list(zip(rows, runs, strict=True)), "warming up", console=console):
        run(texts[: row.batch], 8)
    for row, run in track(list(zip(rows, runs, strict=True)), "whole trees", console=console):
        if whole := getattr(run, "whole", None):
            found = [whole(group, new_tokens) for group in groups_of(texts, row.batch)]
            row.whole = sum(f.tokens for f in found) / sum(f.row_steps for f in found)
            row.accuracy = merged_accuracy(found)
    for _ in track(range(repeats), "decoding in turns", console=console):
        for row, run in zip(rows, runs, strict=True):
            turn(row, run, texts, new_tokens)
    curve = step_times(decoder, texts[0])
    overhead = measure_speculation()
    console.print(overhead.text())
    console.print(render(rows))
    console.print("Step time by nodes (ms): " + ", ".join(f"{n}: {t * 1e3:.2f}" for n, t in curve.items()))
    write(rows, curve, overhead, out, console, trained)


def trained_drafters(trained: Trained, settings: Settings, console: Console) -> dict[str, Drafter]:
    """Heads and a second model for the demo's model, from the cache or trained now."""
    corpus = read_corpus(settings.corpus_bytes)
    ids = encode_files(trained.tokenizer, corpus.train.values())
    windows = ids[: len(ids) // HEADS.window * HEADS.window].view(-1, HEADS.window)
    found: dict[str, Drafter] = {}
    for title, options in KINDS.items():
        wanted = replace(HEADS, **options)  # type: ignore[arg-type]
        path = trained.path.with_name(f"{trained.path.name}-heads-{key_of(wanted)}.safetensors")
        if not path.exists():
            console.print(f"Training {title} heads: {wanted.steps} steps.")
            train_heads(trained.model, windows, wanted, path)
        made = drafter_for(path)
        found[f"{title}, chain of {HEADS.heads}"] = replace(made, tree=Tree.chain(HEADS.heads))
        found[f"{title}, tree"] = made
        found[f"{title}, dynamic tree"] = replace(made, tree="dynamic")
    found["second model, chain of 4"] = accelc.DraftModel(small_model(settings, console).model, tokens=4)
    return found


def small_model(settings: Settings, console: Console) -> Trained:
    """A model of the same text and vocabulary with a tenth of the weights."""
    return trained_model(replace(settings, hidden=128, layers=1, heads=2, kv_heads=1), console)


def key_of(settings: TrainSettings) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def ways(
    decoders: dict[str, accelc.CompiledDecoder],
    trained: Trained,
    drafters: dict[str, Drafter],
    temperature: float,
    theirs: bool,
) -> dict[str, Run]:
    """How the prompts are decoded, by title."""
    found: dict[str, Run] = {"accelc, plain": ours(decoders["plain"], temperature, False)}
    found |= {f"accelc, {name}": ours(decoders[name], temperature, drafter) for name, drafter in drafters.items()}
    if theirs:
        found["transformers, plain"] = of_transformers(trained, temperature, {})
        for tokens in (4, 10):
            found[f"transformers, prompt lookup, {tokens}"] = of_transformers(
                trained, temperature, {"prompt_lookup_num_tokens": tokens}
            )
        (second,) = (drafter for drafter in drafters.values() if isinstance(drafter, accelc.DraftModel))
        assistant: Any = second.model
        assistant.generation_config.num_assistant_tokens = 4
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        found["transformers, second model, 4"] = of_transformers(trained, temperature, {"assistant_model": assistant})
    return found


def ours(decoder: accelc.CompiledDecoder, temperature: float, draft: Drafter | bool) -> Run:
    common = {"ignore_eos": True, "sampling": accelc.SamplingParams(temperature=temperature), "seed": 0, "draft": draft}

    def whole(prompts: list[torch.Tensor], new: int) -> SpeculationStatistics:
        found = decoder.generate(prompts, max_new_tokens=new, draft_nodes=LIMIT, **common).statistics.speculation
        assert found is not None
        return found

    def run(prompts: list[torch.Tensor], new: int) -> tuple[int, float, float]:
        result = decoder.generate(prompts, max_new_tokens=new, **common).statistics
        found = result.speculation
        length = found.mean_accepted_length if found else 1.0
        run.seconds = {} if found is None else {p: s / result.steps * 1e6 for p, s in found.seconds.items()}  # type: ignore[attr-defined]
        return result.new_tokens - result.batch, result.total_seconds - result.first_token_seconds, length

    if draft is not False:
        run.whole = whole  # type: ignore[attr-defined]
    return run


def of_transformers(trained: Trained, temperature: float, options: dict[str, Any]) -> Run:
    """`model.generate` of one prompt; its prefill is measured apart, by a generation of one token."""
    model = trained.model
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    common = {"eos_token_id": model.config.vocab_size, "pad_token_id": 0, **sampling}

    def run(prompts: list[torch.Tensor], new: int) -> tuple[int, float, float]:
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        ids = prompts[0][None]
        given = {"attention_mask": torch.ones_like(ids), **common}
        torch.manual_seed(0)
        with torch.inference_mode():
            begun = time.perf_counter()
            model.generate(ids, max_new_tokens=1, **given)
            first = time.perf_counter()
            hook = model.register_forward_pre_hook(count)
            length = model.generate(ids, max_new_tokens=new, **given, **options).shape[1] - ids.shape[1]
            done = time.perf_counter()
            hook.remove()
        return length - 1, (done - first) - (first - begun), length / calls

    return run


def groups_of(texts: list[torch.Tensor], batch: int) -> list[list[torch.Tensor]]:
    return [texts[i : i + batch] for i in range(0, len(texts) - batch + 1, batch)]


def turn(row: Row, run: Run, texts: list[torch.Tensor], new_tokens: int) -> None:
    """All prompts once."""
    found = [run(group, new_tokens) for group in groups_of(texts, row.batch)]
    row.rates.append(sum(f[0] for f in found) / sum(f[1] for f in found))
    row.accepted.append(mean(f[2] for f in found))
    row.step_us = getattr(run, "seconds", {})


def step_times(decoder: accelc.CompiledDecoder, prompt: torch.Tensor, repeats: int = 30) -> dict[int, float]:
    """Seconds of a verifying step behind a prompt, by its number of nodes: medians, the sizes taking turns."""
    layouts = {n: Tree.chain(n - 1).layout() for n in CURVE}
    times: dict[int, list[float]] = {n: [] for n in CURVE}
    with decoder.start(prompt) as session, session.alone():
        for number in range(repeats + 2):
            for n, layout in layouts.items():
                tokens = torch.full((1, n), 5)
                begun = time.perf_counter()
                session.verify(tokens, layout.depths, layout.words)
                if number > 1:
                    times[n].append(time.perf_counter() - begun)
    return {n: median(t) for n, t in times.items()}


HEADINGS = (
    "way",
    "batch",
    "temperature",
    "tokens/s",
    "of plain",
    "tokens a step",
    "with all nodes",
    "us: draft / verify / accept / update",
)


def figures(row: Row, rows: list[Row]) -> list[str]:
    base = next(r for r in rows if (r.way, r.batch, r.temperature) == ("accelc, plain", row.batch, row.temperature))
    parts = " / ".join(f"{us:.0f}" for us in row.step_us.values())
    return [
        row.way, str(row.batch), f"{row.temperature:g}", f"{row.rate:.0f}", f"{row.rate / base.rate:.2f}x",
        f"{mean(row.accepted):.2f}", "" if row.whole is None else f"{row.whole:.2f}", parts,
    ]  # fmt: skip


def render(rows: list[Row]) -> Table:
    table = Table(title="speculation on held-out text", title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*figures(row, rows))
    return table


def write(
    rows: list[Row], curve: dict[int, float], overhead: Overhead, out: Path, console: Console, trained: Trained
) -> None:
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += [f"| {' | '.join(figures(row, rows))} |" for row in rows]
    lines += ["", "Step time by nodes (ms): " + ", ".join(f"{n}: {t * 1e3:.2f}" for n, t in curve.items())]
    lines += ["", "```", overhead.text(), "```"]
    found = [asdict(row) for row in rows]
    path = write_results(
        out, "speculation", lines, model=trained.record, rows=found, step_seconds=curve, overhead=asdict(overhead)
    )
    console.print(f"Written: {path} and .md next to it", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(typer.run(main))
