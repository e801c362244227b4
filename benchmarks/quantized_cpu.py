"""Products with weights in few bits on CPUs, by number of rows of x: time, share of the memory's bandwidth, and cost
relative to one row, beside torch's own kernels.

    python benchmarks/quantized_cpu.py
    python benchmarks/quantized_cpu.py --matrices 8192x2048 --schemes int4:g128 --rows 1,8

Weights must come from memory: every call reads other copies than the call before it, whatever kernel that was. (Kernels
that read the same copies in turn find them in the last-level cache.) The bandwidth is read in pieces as long as a call,
as often as a kernel is called, so that on a shared machine the best of both is equally undisturbed. (Without these two,
shares came out at up to 1.8.) Calls that take longer are more disturbed: costs of many rows are upper bounds there.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from bandwidth import STREAMS, Bandwidth
from environment import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from accelc.codegen import CompiledStep, Options
from accelc.codegen.pages import PageExchange
from accelc.ir.quantized import LANES, Scheme

MATRICES = ("2048x2048", "512x2048", "8192x2048", "2048x8192", "128256x2048")
"""N x K of Llama-3.2-1B: queries and outputs, keys and values, gate and up, down, head."""
SCHEMES = ("int8:row", "int8:g32", "int8:g128", "int4:g128", "int4:g32")
ROWS = (1, 2, 4, 8, 16, 32, 64)
PIECE = 16 << 20
"""Bytes of weights that a call reads at least: about a millisecond, beside which the call itself is small."""
PIECES = 16
"""So many calls come between two of the same weights: several times a last-level cache."""
DISTURBED = 0.6
"""A table whose best bandwidth is below this part of the run's best was measured beside too much else: its figures are
marked, and mean nothing.
"""
aten = torch.ops.aten


@dataclass
class Candidate:
    """A kernel at some rows of x: `call(i)` multiplies by all `copies` of the weight, `bytes` each, in piece i."""

    name: str
    rows: int
    call: Callable[[int], object]
    copies: int
    bytes: int
    seconds: float = field(default=float("inf"))  # of one copy, the best so far
    spent: float = 0.0

    def run(self, piece: int) -> None:
        started = time.perf_counter()
        self.call(piece)
        taken = time.perf_counter() - started
        self.seconds = min(self.seconds, taken / self.copies)
        self.spent += taken


@dataclass(frozen=True)
class Row:
    """A result: seconds of one product, its bytes of weights a second, that as a share of the memory's, and how many
    products of one row take as long.
    """

    matrix: str
    scheme: str
    kernel: str
    rows: int
    seconds: float
    gb_per_second: float
    of_bandwidth: float
    of_one_row: float


Weight = tuple[Tensor, ...]


def pieces(make: Callable[[], Weight]) -> list[list[Weight]]:
    """PIECES times as many copies as PIECE holds, on huge pages."""
    first = make()
    copies = -(-PIECE // sum(t.nbytes for t in first))
    made = [[tuple(t.clone() for t in first) for _ in range(copies)] for _ in range(PIECES)]
    PageExchange([t for piece in made for weight in piece for t in weight]).finish()
    return made


def ours(n: int, k: int, scheme: Scheme, rows: list[int], activations: list[int], threads: int) -> list[Candidate]:
    """Our kernel with codes and scales as accelc.ir.quantized lays them out."""
    blocks = -(-n // LANES)

    def make() -> Weight:
        codes = torch.randint(256, (blocks, scheme.padded(k) * scheme.bits // 32, 64), dtype=torch.uint8)
        return codes, torch.rand(blocks, scheme.groups(k), LANES).to(scheme.scale_dtype)

    memory = pieces(make)
    size, found = sum(t.nbytes for t in memory[0][0]), []
    for bits in activations:
        options = Options(activation_bits=bits, threads=threads, huge_pages=False)  # type: ignore[arg-type]
        steps = [step_of(piece, k, n, scheme, options) for piece in memory]
        for m in rows:
            x = torch.randn(m, k).bfloat16()
            call = functools.partial(lambda steps, x, i: steps[i](x), steps, x)
            found.append(Candidate(f"{bits}-bit activations", m, call, len(memory[0]), size))
    return found


def step_of(piece: list[Weight], k: int, n: int, scheme: Scheme, options: Options) -> CompiledStep:
    """A step that multiplies its input by each weight of the piece."""
    graph, module = fx.Graph(), torch.nn.Module()
    x = graph.placeholder("x")
    outputs = []
    for index, (codes, scales) in enumerate(piece):
        module.register_buffer(f"codes_{index}", codes)
        module.register_buffer(f"scales_{index}", scales)
        nodes = graph.get_attr(f"codes_{index}"), graph.get_attr(f"scales_{index}")
        arguments = (x, *nodes, None, None, scheme.bits, n)
        outputs.append(graph.call_function(torch.ops.accelc.quantized_linear.default, arguments))
    graph.output(tuple(outputs))
    step = CompiledStep(fx.GraphModule(module, graph), [torch.randn(2, k).bfloat16()], {"x": {0: "B"}}, options)
    assert not step.report.foreign
    return step


def peers(n: int, k: int, scheme: Scheme, rows: list[int]) -> list[Candidate]:
    """torch's kernels for this scheme, and its fp32 product with weights that are dequantized already: what one that
    dequantizes first cannot exceed.
    """
    found: list[Candidate] = []

    def add(name: str, make: Callable[[], Weight], product: Callable[..., Tensor], dtype: torch.dtype) -> None:
        memory = pieces(make)
        size = sum(t.nbytes for t in memory[0][0])
        for m in rows:
            x = torch.randn(m, k).to(dtype)
            call = functools.partial(lambda x, i: [product(x, *weight) for weight in memory[i]], x)
            found.append(Candidate(name, m, call, len(memory[0]), size))

    if scheme.bits == 8 and scheme.group == 0:
        add("torch int8pack", lambda: (torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n).bfloat16()),
            aten._weight_int8pack_mm, torch.bfloat16)  # fmt: skip
    if scheme.bits == 4:
        add("torch int4pack",
            lambda: (aten._convert_weight_to_int4pack_for_cpu(torch.randint(16, (n, k), dtype=torch.int32), 1),
                     torch.rand(k // scheme.group, n, 2).bfloat16()),
            lambda x, w, s: aten._weight_int4pack_mm_for_cpu(x, w, scheme.group, s), torch.bfloat16)  # fmt: skip
    if n * k * 4 <= 4 * PIECE:
        add("torch fp32", lambda: (torch.randn(n, k),), torch.nn.functional.linear, torch.float32)
    return found


def measure(candidates: list[Candidate], meters: list[Bandwidth], seconds: float) -> float:
    """Run all in turn until each has had its `seconds`, three rounds at least; the best bandwidth meanwhile."""
    for candidate in candidates:
        candidate.call(0)  # makes plans
    turn, best = 0, 0.0
    for rounds in range(10000):
        waiting = [c for c in candidates if rounds < 3 or c.spent < seconds]
        if not waiting:
            break
        for candidate in waiting:
            turn += 1
            candidate.run(turn % PIECES)
        best = max(best, meters[rounds % PIECES].read(1, (STREAMS[rounds % len(STREAMS)],)))
    return best


def table(rows: list[Row], bandwidth: float, title: str) -> Table:
    """Rows of x down, kernels across: microseconds, GB/s of weights, share of the bandwidth, cost in single rows."""
    made = Table(title=f"{title}, memory {bandwidth / 1e9:.1f} GB/s", title_justify="left")
    made.add_column("M", justify="right")
    kernels = list(dict.fromkeys(row.kernel for row in rows))
    for kernel in kernels:
        made.add_column(f"{kernel}\nus, GB/s, share, cost", justify="right", no_wrap=True)
    by = {(row.kernel, row.rows): row for row in rows}
    for m in dict.fromkeys(row.rows for row in rows):
        cells = [by[kernel, m] for kernel in kernels]
        made.add_row(str(m), *(f"{c.seconds * 1e6:.0f} {c.gb_per_second:5.1f} {c.of_bandwidth:4.0%} {c.of_one_row:5.2f}"
                               for c in cells))  # fmt: skip
    return made


def main(
    matrices: Annotated[str, typer.Option(help="N x K of weights, by commas")] = ",".join(MATRICES),
    schemes: Annotated[str, typer.Option(help="by commas")] = ",".join(SCHEMES),
    rows: Annotated[str, typer.Option(help="rows of x, by commas")] = ",".join(map(str, ROWS)),
    activations: Annotated[str, typer.Option(help="bits of an activation, by commas")] = "16,8",
    torch_kernels: Annotated[bool, typer.Option(help="measure torch's kernels as well")] = True,
    threads: Annotated[int, typer.Option(help="0: torch's number")] = 0,
    seconds: Annotated[float, typer.Option(help="of measuring for each kernel and number of rows")] = 0.2,
    output: Annotated[Path | None, typer.Option(help="write all figures there as JSON")] = None,
) -> None:
    """Print one table for each matrix and scheme."""
    torch.manual_seed(0)
    torch.set_num_threads(threads or torch.get_num_threads())
    meters = [Bandwidth(PIECE) for _ in range(PIECES)]
    console, results = Console(width=140), []
    # Each in turn: none from the cache.
    highest = max(meter.read(1, (streams,)) for streams in (*STREAMS, *STREAMS) for meter in meters)
    counts = [int(m) for m in rows.split(",")]
    for shape in matrices.split(","):
        n, k = (int(size) for size in shape.split("x"))
        for text in schemes.split(","):
            parsed = Scheme.parse(text)
            candidates = ours(n, k, parsed, counts, [int(bits) for bits in activations.split(",")], threads)
            candidates += peers(n, k, parsed, counts) if torch_kernels else []
            bandwidth = measure(candidates, meters, seconds)
            single = {c.name: c.seconds for c in candidates if c.rows == min(counts)}
            found = [
                Row(shape, text, c.name, c.rows, c.seconds, c.bytes / c.seconds / 1e9, c.bytes / c.seconds / bandwidth,
                    c.seconds / single[c.name])
                for c in candidates
            ]  # fmt: skip
            highest = max(highest, bandwidth)
            disturbed = bandwidth < DISTURBED * highest
            mark = " (DISTURBED, measure again)" if disturbed else ""
            console.print(table(found, bandwidth, f"{shape} {text}{mark}"))
            results += [asdict(row) | {"bandwidth": bandwidth, "disturbed": disturbed} for row in found]
    if output:
        output.write_text(json.dumps({"environment": describe(), "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
