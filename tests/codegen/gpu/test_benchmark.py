"""The benchmark of products: it ends in order without a GPU, and its figures are what it says they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))  # scripts, not a package

import quantized_gemm as benchmark
from codegen_gpu import random_weight

from accelc.ir.quantized import Scheme

SCRIPT = benchmark.__file__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu_and_ends_in_order() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No CUDA device" in done.stdout


def test_unknown_contenders_are_named() -> None:
    command = [sys.executable, SCRIPT, "--contenders", "accelc,cutlas"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cutlas" in done.stderr


def test_a_wrong_product_is_not_timed() -> None:
    weight = random_weight(Scheme.parse("int4"), 32, 256, 0)
    dense = weight.dequantize()
    x = torch.randn(4, 256)
    assert benchmark.check("accelc", lambda x: x @ dense.T, x, weight) < 1e-6
    wrong = dense.clone()
    wrong[:, :16] = 0
    with pytest.raises(benchmark.Unavailable, match="off by"):
        benchmark.check("accelc", lambda x: x @ wrong.T, x, weight)
    with pytest.raises(benchmark.Unavailable, match="off by nan"):
        benchmark.check("accelc", lambda x: x @ dense.T * float("nan"), x, weight)
    rounded = dense * 1.05  # a library's own rounding, which is told
    assert 0.02 < benchmark.check("torchao", lambda x: x @ rounded.T, x, weight) < 0.1
    with pytest.raises(benchmark.Unavailable, match="off by"):
        benchmark.check("accelc", lambda x: x @ rounded.T, x, weight)


def test_tables_hold_what_was_measured() -> None:
    samples = [
        benchmark.Sample("accelc", "int4", "o", 1, 3.25, 0.75, 0.002),
        benchmark.Sample("gemlite", "int4", "o", 4, 9.0, 0.3, 0.03),
    ]
    table = next(t for t in benchmark.tables(samples, "int4", (1, 4)) if "o [4096, 4096]" in str(t.title))
    assert [list(column.cells) for column in table.columns] == [
        ["accelc", "gemlite"], ["3.2 (0.75)", "-"], ["-", "9.0 (0.30)"]
    ]  # fmt: skip
