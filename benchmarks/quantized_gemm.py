"""Products of few rows with weights in few bits on a GPU: accelc's Triton kernel beside others, as a share of the
bandwidth that the memory has, read in the same run.

    python benchmarks/quantized_gemm.py

Matrices are those of Llama-3.1-8B. Copies of a weight are taken in turn inside one captured CUDA graph, more of them
than the second-level cache holds: a matrix of a few megabytes would come out of the cache otherwise, which it does not
in a model. Each contender's result is compared with the dequantized weights before it is timed.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from environment import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from accelc.codegen.gpu.measure import copies, seconds_in_a_graph, seconds_of, what_is_wrong
from accelc.ir.quantized import QuantizedWeight, Scheme, unpack

MATRICES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate and up": (28672, 4096), "down": (4096, 14336)}
"""[N, K] of Llama-3.1-8B, projections of one input joined."""
ROWS = (1, 4, 8, 16, 32, 64)
GROUP = 128
TOLERANCE = 0.02
"""Of the largest output, for results of accelc and torch to count as right; 4-bit weights rounded to bf16 once more
stay within it."""
TOLERANCE_OF_PEERS = 0.15
"""The same for libraries that round weights by their own rule, or add parts of sums in bf16: their error is told."""


TUNED: dict[str, dict[str, float]] = {}
"""Microseconds of accelc's tiles by scheme, matrix and tokens."""


class Unavailable(Exception):
    """A contender that does not run here, with the reason."""


@dataclass(frozen=True)
class Sample:
    """One contender on one matrix: microseconds a product, medians of replays; ``share`` of the measured bandwidth,
    counting the bytes of the weight as the contender stores it; the largest ``error`` as a share of the largest output.
    """

    contender: str
    scheme: str
    matrix: str
    rows: int
    microseconds: float
    share: float
    error: float


Product = Callable[[Tensor], Tensor]
Build = Callable[[QuantizedWeight], tuple[Product, int]]
"""From a weight on the GPU to its product and the bytes that it stores."""


def accelc(weight: QuantizedWeight) -> tuple[Product, int]:
    from accelc.codegen.gpu import tile_weight
    from accelc.codegen.gpu.quantized_gemm import quantized_gemm

    tiled = tile_weight(weight)
    return lambda x: quantized_gemm(x, tiled), tiled.nbytes


def dense(weight: QuantizedWeight) -> tuple[Product, int]:
    """torch's product in bf16: what weights in few bits are compared with."""
    full = weight.dequantize(torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, full), full.nbytes


def tinygemm(weight: QuantizedWeight) -> tuple[Product, int]:
    """torch's own int4 kernel."""
    if weight.scheme.bits != 4:
        raise Unavailable("4 bits only")
    codes = plain_codes(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    # Its value is (code - 8) * scale + zero.
    scales = weight.scale_matrix.T.to(torch.bfloat16)
    both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()  # [G, N, 2]
    group = weight.scheme.group
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, both), packed.nbytes + both.nbytes


def torchao(weight: QuantizedWeight) -> tuple[Product, int]:
    """torchao's weight-only linear, quantized by itself from the dequantized weight."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise Unavailable("torchao is not installed") from error
    layer = torch.nn.Linear(weight.columns, weight.rows, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data = weight.dequantize(torch.bfloat16)
    if weight.scheme.bits == 8:
        # Made for torch.compile: run as it is, it would write the weight out in bf16.
        quantize_(layer, Int8WeightOnlyConfig(version=2))
        linear = compiled_linear()
        return lambda x: linear(x, layer.weight), weight.rows * weight.columns + 2 * weight.rows
    options: dict[str, Any] = {"group_size": weight.scheme.group}
    if "int4_packing_format" in inspect.signature(Int4WeightOnlyConfig).parameters:
        options["int4_packing_format"] = "tile_packed_to_4d"  # the layout of its kernel for GPUs
    quantize_(layer, Int4WeightOnlyConfig(**options))
    return layer, weight.rows * weight.columns // 2 + 4 * weight.rows * weight.columns // weight.scheme.group


@functools.cache
def load_gemlite_tiles() -> None:
    """Those of the H100 for every Hopper GPU: it has none for the others, which run the same code; measuring all of
    its tiles takes many minutes.
    """
    import gemlite as module

    folder = Path(module.__file__).parent / "configs"
    if torch.cuda.get_device_capability() == (9, 0):
        module.load_config(str(folder / "h100.json"))


@functools.cache
def compiled_linear() -> Callable[[Tensor, Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = 64  # one for each shape
    return torch.compile(torch.nn.functional.linear, dynamic=False)


def gemlite(weight: QuantizedWeight) -> tuple[Product, int]:
    """gemlite's Triton kernels, with the tiles that it brings for the GPU."""
    try:
        from gemlite.core import DType, GemLiteLinearTriton
    except ImportError as error:
        raise Unavailable("gemlite is not installed") from error
    load_gemlite_tiles()
    scheme = weight.scheme
    layer = GemLiteLinearTriton(
        scheme.bits, scheme.group or weight.columns, weight.columns, weight.rows, DType.BF16, DType.BF16
    )
    layer.pack(plain_codes(weight), weight.scale_matrix.to(torch.bfloat16).reshape(-1, 1), scheme.middle, None)
    groups = weight.scale_matrix.shape[1]
    return layer.forward, weight.rows * (weight.columns * scheme.bits // 8 + 2 * groups)


CONTENDERS: dict[str, Build] = {
    "accelc": accelc,
    "torch bf16": dense,
    "_weight_int4pack_mm": tinygemm,
    "torchao": torchao,
    "gemlite": gemlite,
}


PEERS = ("torchao", "gemlite")


def plain_codes(weight: QuantizedWeight) -> Tensor:
    """Codes uint8 [N, K]."""
    return unpack(weight.codes, weight.scheme.bits, weight.rows)[:, : weight.columns].contiguous()


def random_weight(scheme: Scheme, rows: int, columns: int) -> QuantizedWeight:
    """A weight of random codes on the GPU, as large as those of a model."""
    codes = torch.randint(scheme.levels, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = (0.5 + torch.rand(rows, scheme.groups(columns), device="cuda")) * 0.1 / scheme.levels
    return QuantizedWeight.of(scheme, codes, scales, None, columns)


def bandwidth() -> float:
    """Bytes a second of a copy of 2 GiB, read and written, the best of some."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / seconds


def check(name: str, product: Product, x: Tensor, weight: QuantizedWeight) -> float:
    """The largest error of a product, as a share of the largest output. Raises Unavailable if it is wrong."""
    want = x.double() @ weight.dequantize(torch.float64).T
    if wrong := what_is_wrong([product(x)], want, TOLERANCE_OF_PEERS if name in PEERS else TOLERANCE):
        raise Unavailable(wrong)
    return float((product(x) - want).abs().max() / want.abs().max())


def measure(
    name: str, scheme: Scheme, matrix: str, rows: Sequence[int], tune: int, limit: float
) -> tuple[list[Sample], str]:
    """One contender on one matrix, and why it is missing, if it is."""
    n, k = MATRICES[matrix]
    torch.manual_seed(0)
    weight = random_weight(scheme, n, k)
    samples: list[Sample] = []
    try:
        product, size = CONTENDERS[name](weight)
        others = range(copies(size) - 1)
        products = [product, *(CONTENDERS[name](random_weight(scheme, n, k))[0] for _ in others)]
        for count in rows:
            x = torch.randn(count, k, device="cuda", dtype=torch.bfloat16)
            if name == "accelc" and tune:
                tune_tile(x, weight, matrix, tune)
            error = check(name, product, x, weight)
            seconds = seconds_in_a_graph([functools.partial(product, x) for product in products])
            samples.append(Sample(name, str(scheme), matrix, count, seconds * 1e6, size / seconds / limit, error))
    except Unavailable as reason:
        return samples, str(reason)
    except Exception as error:  # a peer's own failure, of any kind, must not end the run
        if name == "accelc":
            raise
        return samples, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        products = []
        gc.collect()
        torch.cuda.empty_cache()
    return samples, ""


def tune_tile(x: Tensor, weight: QuantizedWeight, matrix: str, most: int) -> None:
    """Measure accelc's tiles for a shape, once for all numbers of rows that share one; the times go to TUNED."""
    from accelc.codegen.gpu import tile_weight
    from accelc.codegen.gpu.quantized_gemm import target_of, tune
    from accelc.codegen.gpu.tiles import tokens_of

    key = f"{weight.scheme}, {matrix}, {tokens_of(x.shape[0], target_of(x.device))} tokens"
    if key not in TUNED:
        TUNED[key] = {str(tile): round(seconds, 2) for tile, seconds in tune(x, tile_weight(weight), most).items()}


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel is made for; the sizes of a matrix do not matter otherwise."""

    scheme: Scheme
    matrix: str
    rows: int
    tile: Any
    """`accelc.codegen.gpu.Tile`."""


def kernels_to_measure(schemes: Sequence[Scheme], rows: Sequence[int], most: int) -> list[Kernel]:
    """Every kernel that `tune_tile` will ask for, each once."""
    from accelc.codegen.gpu.quantized_gemm import target_of
    from accelc.codegen.gpu.tiles import Weights, candidates

    target = target_of(torch.device("cuda"))
    found: dict[Any, Kernel] = {}
    for scheme in schemes:
        for matrix, (n, k) in MATRICES.items():
            for count in rows:
                for tile in candidates(Weights(scheme, n, k), count, target)[: max(most, 1)]:
                    key = scheme, replace(tile, split=min(tile.split, 2))  # whether K is split, not how often
                    found.setdefault(key, Kernel(scheme, matrix, count, tile))
    return list(found.values())


def compile_kernels(kernels: Sequence[Kernel]) -> None:
    """Leave compiled kernels in Triton's cache, from which the measuring process takes them."""
    from triton.runtime.errors import OutOfResources

    from accelc.codegen.gpu import tile_weight
    from accelc.codegen.gpu.quantized_gemm import quantized_gemm

    weights: dict[tuple[Scheme, str], Any] = {}
    for kernel in kernels:
        n, k = MATRICES[kernel.matrix]
        key = kernel.scheme, kernel.matrix
        if key not in weights:
            weights = {key: tile_weight(random_weight(kernel.scheme, n, k))}
        x = torch.randn(kernel.rows, k, device="cuda", dtype=torch.bfloat16)
        try:
            quantized_gemm(x, weights[key], tile=kernel.tile)
        except OutOfResources:
            continue


def compile_beside(kernels: Sequence[Kernel], jobs: int) -> None:
    """Compile in `jobs` processes; each prepares kernels of every kind, since some take longer than others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done in [pool.submit(compile_kernels, kernels[first::jobs]) for first in range(jobs)]:
            done.result()


def tables(samples: Sequence[Sample], scheme: str, rows: Sequence[int]) -> list[Table]:
    """One table a matrix: microseconds and the share of the bandwidth, by rows of x."""
    made = []
    for matrix, (n, k) in MATRICES.items():
        table = Table(title=f"{scheme}, {matrix} [{n}, {k}]: us (share of bandwidth)", title_justify="left")
        table.add_column("contender")
        for count in rows:
            table.add_column(f"M = {count}", justify="right")
        for name in CONTENDERS:
            found = {s.rows: s for s in samples if (s.contender, s.scheme, s.matrix) == (name, scheme, matrix)}
            if found:
                cells = [f"{found[m].microseconds:.1f} ({found[m].share:.2f})" if m in found else "-" for m in rows]
                table.add_row(name, *cells)
        made.append(table)
    return made


def main(
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = "int4,int8",
    rows: Annotated[str, typer.Option(help="Rows of x, separated by commas.")] = ",".join(map(str, ROWS)),
    contenders: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(CONTENDERS),
    tune: Annotated[int, typer.Option(help="Tiles of accelc to measure for each shape; 0: take the model's.")] = 12,
    jobs: Annotated[int, typer.Option(help="Processes that compile accelc's kernels; 0: one a core, at most 8.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print tables, and write the samples to a file."""
    counts = [int(part) for part in rows.split(",")]
    parsed = [Scheme.parse(part) for part in schemes.split(",")]
    names = [part.strip() for part in contenders.split(",")]
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise typer.BadParameter(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    console = Console(width=110)
    if not torch.cuda.is_available():
        console.print("No CUDA device: nothing is measured. Run it on a machine with a GPU and a torch built for it.")
        raise typer.Exit(0)
    if "accelc" in names:
        wanted = kernels_to_measure(parsed, counts, tune)
        with console.status(f"compiling {len(wanted)} kernels"):
            compile_beside(wanted, jobs or min(8, os.cpu_count() or 1))
    limit = bandwidth()
    console.print(f"{torch.cuda.get_device_name()}: a copy moves {limit / 1e9:.0f} GB/s")
    samples: list[Sample] = []
    missing: dict[str, str] = {}

    def write() -> None:
        record = {
            "environment": describe(),
            "gpu": torch.cuda.get_device_name(),
            "bandwidth": limit,
            "samples": [asdict(sample) for sample in samples],
            "missing": missing,
            "tiles": TUNED,
        }
        if output is not None:
            output.write_text(json.dumps(record, indent=1) + "\n")

    for scheme in parsed:
        for name in names:
            for matrix in MATRICES:
                found, reason = measure(name, scheme, matrix, counts, tune, limit)
                samples += found
                if reason:
                    missing[f"{name}, {scheme}, {matrix}"] = reason
                write()  # a peer may take long to tune itself, and may be cut short
        for table in tables(samples, str(scheme), counts):
            console.print(table)
        for name in names:
            if errors := [s.error for s in samples if (s.contender, s.scheme) == (name, str(scheme))]:
                console.print(f"{name}: off by {max(errors):.2%} of the largest output at most")
    for who, reason in missing.items():
        console.print(f"{who}: {reason}")


if __name__ == "__main__":
    typer.run(main)
