"""What speculation gives where a step is bound by memory: large shapes with random weights, acceptance replayed.

    python benchmarks/speculation.py             # first: records how often the drafts of the demo's model are right
    python benchmarks/speculation_speed.py --shape 160m --dtype fp32 --work DIR

Random weights have nothing to guess. So each drafter drafts and the model verifies as ever, but which drafts are kept
is drawn from the accuracies, by depth and rank, that the drafter had on the demo's trained model and held-out text: the
time of every part is real, the acceptance is of another model, and the table says so. Heads are random too, and kept in
few bits (`--heads`); their trees are those of the recorded accuracies. The ways take turns; figures are medians.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from environment import write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import DTYPES, SCHEMES, SHAPES, Shape, load_model, make_model, prompt
from torch import Tensor
from transformers import LlamaForCausalLM

import accelc
from accelc.heads.files import HeadsFile
from accelc.heads.graph import Backbone
from accelc.heads.modules import DraftHeads, HeadsConfig
from accelc.ir import Exactness
from accelc.passes import Pipeline
from accelc.passes.tap_hidden import TapHidden
from accelc.runtime.speculation.acceptance import AcceptanceRule, Successor, at_node
from accelc.runtime.speculation.draft import Accepted, Drafter
from accelc.runtime.speculation.target import Target
from accelc.runtime.speculation.trees import Tree, best_tree

RESULTS = Path(__file__).parent / "results"
NODES = 24
"""Of the trees that the recorded accuracies give, the root included; a step verifies as many of them as pay."""


@dataclass(frozen=True)
class Replayed(AcceptanceRule):
    """Keeps drafts as often as was recorded, whatever they are. accuracy[d][r]: of the candidate of rank r at depth d,
    where the path to it is right; at most one of the children of a node is.
    """

    name = "benchmark.replayed"
    exactness = Exactness.LOSSY
    accuracy: tuple[tuple[float, ...], ...] = ()

    def judge(self, target: Target) -> tuple[Tensor, Successor, Tensor | None]:
        chosen, layout = target.chosen, target.draft.layout  # what greedy acceptance computes as well
        width = max(layout.width, *map(len, self.accuracy))
        table = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in self.accuracy])
        table = torch.cat([table, torch.zeros(max(0, layout.depth - len(table)), width)])
        upto = table.cumsum(-1)
        depths, ranks = (layout.depths - 1).clamp(min=0), layout.ranks
        number = target.uniforms(layout.size).gather(1, layout.parents.clamp(min=0).expand_as(chosen))
        hits = (number < upto[depths, ranks]) & (number >= (upto - table)[depths, ranks])
        return hits, lambda node: at_node(chosen, node), None

    def accept(self, target: Target) -> Accepted:
        accepted = super().accept(target)
        return replace(accepted, tokens=accepted.tokens.clamp(min=0))  # nodes without a token were kept too


@dataclass
class Row:
    """One way of decoding."""

    way: str
    rates: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    steps: dict[int, tuple[int, float]] = field(default_factory=dict)
    """By nodes: steps, and the median of their seconds, in the last turn."""

    @property
    def rate(self) -> float:
        return median(self.rates)


def main(
    shape: Annotated[str, typer.Option(help=f"One of: {', '.join(SHAPES)}.")] = "160m",
    dtype: Annotated[str, typer.Option(help=f"Weights, one of: {', '.join(DTYPES)}.")] = "fp32",
    heads: Annotated[str, typer.Option(help="Scheme of the heads' weights.")] = "int8",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    repeats: Annotated[int, typer.Option(help="Turns of each way.", min=1)] = 5,
    recorded: Annotated[Path | None, typer.Option(help="A result of speculation.py; default: the latest.")] = None,
    work: Annotated[Path | None, typer.Option(help="Keep weights here; default: deleted.")] = None,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = RESULTS,
) -> None:
    """Measure every drafter at one shape; print a table, and write it as JSON and Markdown."""
    console = Console(highlight=False)
    accuracies = recorded_accuracies(recorded or latest())
    folder = work or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        length = prompt_tokens + new_tokens
        path = folder / f"{shape}-{'bf16' if dtype in SCHEMES else dtype}-{length}"
        make_model(SHAPES[shape], dtype, length, path)
        quantize = accelc.QuantizeWeights(*SCHEMES[dtype]) if dtype in SCHEMES else None
        decoder = accelc.compile(load_model(path), max_length=length, quantize=quantize)
    finally:
        if work is None:
            shutil.rmtree(folder)
    decoder.settle()
    texts = [prompt(SHAPES[shape], prompt_tokens, seed)[0] for seed in range(batch)]
    ways = {"plain": (None, None)} | {
        way: (drafter(decoder, way, accuracy, heads), Replayed(tuple(map(tuple, accuracy))))
        for way, accuracy in accuracies.items()
    }
    rows = {way: Row(way) for way in ways}
    for number in track(range(-1, repeats), "decoding in turns", console=console):
        for way, (draft, rule) in ways.items():
            result = decoder.generate(
                texts, max_new_tokens=new_tokens, ignore_eos=True, draft=draft or False, accept=rule, seed=number + 1
            ).statistics
            if number >= 0:
                rows[way].rates.append(result.decode_tokens_per_second)
                found = result.speculation
                rows[way].accepted.append(found.mean_accepted_length if found else 1.0)
                rows[way].steps = found.step_seconds if found else {}
    title = f"{shape} {dtype}, batch {batch}; acceptance REPLAYED from the demo's model, heads {heads}"
    console.print(render(title, list(rows.values())))
    lines = [title, "", f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += [f"| {' | '.join(figures(row, rows['plain']))} |" for row in rows.values()]
    name = f"speculation-speed-{shape}-{dtype}-{batch}"
    written = write_results(out, name, lines, rows=[asdict(row) for row in rows.values()], accuracies=accuracies)
    console.print(f"Written: {written} and .md next to it", soft_wrap=True)


def latest() -> Path:
    """The newest result of speculation.py."""
    found = [p for p in RESULTS.glob("speculation-*.json") if "-speed-" not in p.name]
    return max(found, key=lambda p: json.loads(p.read_text())["date"])


def recorded_accuracies(path: Path) -> dict[str, list[list[float]]]:
    """By drafter, at batch 1 and temperature 0."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    found = {
        row["way"].removeprefix("accelc, "): row["accuracy"]
        for row in rows
        if row["batch"] == 1 and row["temperature"] == 0 and row.get("accuracy")
    }
    if not found:
        raise typer.BadParameter(f"{path} holds no accuracies: run benchmarks/speculation.py first")
    return found


def drafter(decoder: accelc.CompiledDecoder, way: str, accuracy: list[list[float]], heads: str) -> Drafter:
    """Of the kind that a recorded way names, with the best tree for its accuracies."""
    tree = best_tree(accuracy, NODES - 1)
    kind = way.split(",")[0]
    if kind == "prompt lookup":
        return accelc.PromptLookup(tokens=len(accuracy))
    if kind == "token recycling":
        return accelc.TokenRecycling(tree)
    if kind in ("medusa", "hydra", "hydra++"):
        file = random_heads(decoder, kind, len(accuracy))
        form = "dynamic" if "dynamic" in way else Tree.chain(len(accuracy)) if "chain" in way else tree
        return (accelc.Medusa if kind == "medusa" else accelc.Hydra)(file, tree=form, quantize=heads)
    if kind == "second model":
        return accelc.DraftModel(small_model(decoder.vocab_size, decoder.max_length), tokens=len(accuracy))
    raise typer.BadParameter(f"no drafter is known for {way!r}")


def small_model(vocabulary: int, length: int) -> LlamaForCausalLM:
    """Of a tenth of the demo model's weights, without its vocabulary."""
    torch.manual_seed(0)
    return LlamaForCausalLM(Shape("small", 128, 512, 1, 2, 1, vocabulary, tied=True).config(length)).eval()


def random_heads(decoder: accelc.CompiledDecoder, kind: str, count: int) -> HeadsFile:
    backbone = Backbone.of(Pipeline([TapHidden()]).run(decoder.programs["step"]))
    config = HeadsConfig(
        kind.removesuffix("++"), backbone.hidden, backbone.embedding, backbone.vocab_size, count, prefix="++" in kind
    )
    torch.manual_seed(0)
    return HeadsFile(DraftHeads(config).eval())


HEADINGS = ("way", "tokens/s", "of plain", "tokens a step", "steps of N nodes: ms")


def figures(row: Row, plain: Row) -> list[str]:
    ratio = median(a / b for a, b in zip(row.rates, plain.rates, strict=True))
    steps = ", ".join(f"{count} of {nodes}: {s * 1e3:.1f}" for nodes, (count, s) in row.steps.items())
    return [row.way, f"{row.rate:.1f}", f"{ratio:.2f}x", f"{mean(row.accepted):.2f}", steps]


def render(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*figures(row, rows[0]))
    return table


if __name__ == "__main__":
    sys.exit(typer.run(main))
