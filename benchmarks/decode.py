"""Greedy batch-1 decoding, compared: accelc, transformers, and other engines that are installed.

    python benchmarks/decode.py                                     # 160M and 1B shapes, fp32 and bf16
    python benchmarks/decode.py --shape 1b --dtype bf16 --peer accelc --peer llama_cpp
    python benchmarks/decode.py --shape 1b --dtype int8 --dtype int4   # weights in few bits

Each peer runs in a process of its own, on the same random weights. A peer is started twice on one set of caches, first
empty, then filled: the two starting times. Then the peers of a group (as many as fit in memory; accelc is in each) take
turns. Memory bandwidth is read just before and just after each sample, because on shared machines it changes by the
minute: `of limit` is a sample's bytes a second over that bandwidth, and ratios between peers use turns in which both
saw the same bandwidth.

The files are named by shapes, types and commit, such as results/decode-160m-bf16-1a2b3c4.json; a further run of the
same adds a number and overwrites nothing. The Markdown file next to it holds the table for a README.
"""

import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from bandwidth import Bandwidth
from environment import describe
from overhead import measure_demo_model
from peers import NAMES, Job, Peer, load
from rich.console import Console
from samples import BASE, Case, Row, Sample
from shapes import DTYPES, SHAPES, Shape, make_model, prompt
from tables import markdown, terminal
from worker import Worker, WorkerError

RESULTS = Path(__file__).parent / "results"

ShapeName = StrEnum("ShapeName", {name: name for name in SHAPES})
DtypeName = StrEnum("DtypeName", {name: name for name in DTYPES})
PeerName = StrEnum("PeerName", {name: name for name in NAMES})


def main(
    shape: Annotated[list[ShapeName] | None, typer.Option(help="Model shapes; default: 160m and 1b.")] = None,
    dtype: Annotated[list[DtypeName] | None, typer.Option(help="Weights; default: fp32 and bf16.")] = None,
    peer: Annotated[list[PeerName] | None, typer.Option(help="Decoders; default: all that are installed.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 64,
    new_tokens: Annotated[int, typer.Option(min=3)] = 64,
    repeats: Annotated[int, typer.Option(help="Turns of each group.", min=1)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = psutil.cpu_count(logical=False) or 1,
    overhead: Annotated[bool, typer.Option(help="Take a step of the demo's model apart as well.")] = True,
    work: Annotated[Path | None, typer.Option(help="Keep weights and converted files here; default: deleted.")] = None,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = RESULTS,
) -> None:
    """Measure decoding; print tables, and write a JSON file, a Markdown table and a plot."""
    console = Console(highlight=False)
    torch.set_num_threads(threads)
    meter = Bandwidth(threads=threads)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe(),
    }
    cases: list[Case] = []
    if overhead:
        found = measure_demo_model()
        console.print(found.text())
        record["overhead"] = asdict(found)
    folder = work or Path(tempfile.mkdtemp(prefix="accelc-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for shape_name, dtype_name in itertools.product(shape or ("160m", "1b"), dtype or ("fp32", "bf16")):
            job = Job(
                path=folder / f"{shape_name}-{dtype_name}-{prompt_tokens + new_tokens}",
                shape=SHAPES[shape_name],
                dtype=dtype_name,
                max_length=prompt_tokens + new_tokens,
                threads=threads,
                work=folder,
            )
            case = measure(job, [str(p) for p in peer or NAMES], prompt_tokens, new_tokens, repeats, meter, console)
            console.print(terminal(case))
            cases.append(case)
    finally:
        if work is None:
            shutil.rmtree(folder, ignore_errors=True)
    write(cases, record, out, console)


def measure(
    job: Job,
    names: Sequence[str],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    meter: Bandwidth,
    console: Console,
) -> Case:
    """All peers on one model."""
    case = Case(
        shape=job.shape.name,
        dtype=job.dtype,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=job.threads,
        bytes_per_token=job.shape.bytes_per_token(job.dtype, prompt_tokens + new_tokens / 2),
    )
    peers = {}
    for name in names:
        peer: Peer = load(name).PEER
        if reason := peer.missing(job.dtype):
            case.skipped[name] = reason
        else:
            peers[name] = peer
    console.print(f"[bold]{case.title}[/bold]: making weights")
    make_model(job.shape, job.dtype, job.max_length, job.path)
    ids = prompt(job.shape, prompt_tokens)
    for group in groups(peers, job.shape, job.dtype, psutil.virtual_memory().available):
        measure_group(case, job, {name: peers[name] for name in group}, ids, repeats, meter, console)
    return case


def measure_group(
    case: Case, job: Job, peers: dict[str, Peer], ids: torch.Tensor, repeats: int, meter: Bandwidth, console: Console
) -> None:
    """Start the peers and let them take turns; one that fails is noted in `case.skipped` and left out."""
    caches = {name: tempfile.mkdtemp(prefix=f"accelc-bench-{name}-") for name in peers}
    workers: dict[str, Worker] = {}
    try:
        for name, peer in peers.items():
            console.print(f"  starting {peer.title}, cold and warm")
            starts = []
            try:
                with Worker(name, peer, job, caches[name]) as cold:
                    starts.append(cold.start(ids, case.new_tokens))
                workers[name] = Worker(name, peer, job, caches[name])
                starts.append(workers[name].start(ids, case.new_tokens))
            except WorkerError as error:
                case.skipped[name] = error.reason
                console.print(f"  [yellow]{error}[/yellow]")
                if name in workers:
                    workers.pop(name).close()
                continue
            if name not in case.rows:
                case.rows[name] = Row(
                    peer.title,
                    peer.lossy or (job.quantized and name != BASE),
                    starts[0].seconds,
                    starts[1].seconds,
                    settle_seconds=starts[1].settle_seconds,
                )
        for turn in range(repeats):
            for name in list(workers):
                try:
                    take_sample(case, name, workers[name], f"{'+'.join(peers)}/{turn}", ids, meter)
                except WorkerError as error:
                    case.skipped[name] = error.reason
                    console.print(f"  [yellow]{error}[/yellow]")
                    workers.pop(name).close()
            console.print(f"  turn {turn + 1} of {repeats}")
        if BASE in workers:
            context = case.prompt_tokens + case.new_tokens // 2
            case.rows[BASE].step_of_limit = workers[BASE].share_of_limit(context, case.bytes_per_token)
    finally:
        for worker in workers.values():
            worker.close()
        for path in caches.values():
            shutil.rmtree(path, ignore_errors=True)


def take_sample(case: Case, name: str, worker: Worker, turn: str, ids: torch.Tensor, meter: Bandwidth) -> None:
    """One generation between two readings of the memory's bandwidth."""
    time.sleep(0.3)  # threads of the one before spin for a while
    before = meter.read() / 1e9
    timed = worker.generate(ids, case.new_tokens)
    after = meter.read() / 1e9
    row = case.rows[name]
    row.tokens = list(timed.tokens)
    row.samples.append(Sample(turn, timed.tokens_per_second, timed.first_token_seconds, before, after))


def groups(peers: dict[str, Peer], shape: Shape, dtype: str, available: int) -> list[list[str]]:
    """Peers that are at work together: as many as fit in `available` bytes, the base in each group."""
    weights = shape.parameters * DTYPES[dtype].itemsize
    need = {name: peer.copies * weights + 1.0e9 for name, peer in peers.items()}
    base = [BASE] if BASE in peers else []
    room = 0.9 * available - sum(need[name] for name in base)
    result: list[list[str]] = []
    left = 0.0
    for name in (n for n in peers if n not in base):
        if not result or need[name] > left:
            result.append([*base])
            left = room
        result[-1].append(name)
        left -= need[name]
    return result or [base]


def write(cases: Sequence[Case], record: dict[str, Any], out: Path, console: Console) -> None:
    """The JSON file, the Markdown table and the plot."""
    from plot import plot

    out.mkdir(parents=True, exist_ok=True)
    path = unused(out, cases, record["environment"]["commit"] or "unknown")
    record = record | {"cases": [asdict(case) | {"summary": case.summary()} for case in cases]}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(cases, record["environment"]), encoding="utf-8")
    plot(record, path.with_suffix(".svg"))
    console.print(f"Written: {path}, and .md and .svg next to it", soft_wrap=True)


def unused(out: Path, cases: Sequence[Case], commit: str) -> Path:
    """A JSON file in `out` that does not exist yet, named by what was decoded and by the commit."""
    parts = [*dict.fromkeys(case.shape for case in cases), *dict.fromkeys(case.dtype for case in cases), commit]
    stem = "-".join(["decode", *parts])
    names = (f"{stem}{suffix}.json" for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
    return next(out / name for name in names if not (out / name).exists())


if __name__ == "__main__":
    sys.exit(typer.run(main))
