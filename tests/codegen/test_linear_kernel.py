"""Linears with few rows (dot products) and many (panels), against float64."""

from __future__ import annotations

import pytest
import torch
from codegen_single import run_single
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from accelc.codegen import CompiledStep, Options

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LINEAR = torch.ops.aten.linear.default


def check(rows, inner, outer, dtype, bias, seed=0, **how) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, inner, generator=g).to(dtype), torch.randn(outer, inner, generator=g).to(dtype)
    c = torch.randn(outer, generator=g).to(dtype) if bias else None
    got = run_single(LINEAR, x, w, c, **how)
    want = torch.nn.functional.linear(x.double(), w.double(), None if c is None else c.double())
    scale = max(inner, 1) ** 0.5
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * scale, rtol=TOLERANCE[dtype])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    inner=st.sampled_from([1, 7, 31, 32, 33, 64, 100, 130, 513]),
    outer=st.integers(1, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_matches_float64(rows, inner, outer, dtype, bias, seed) -> None:
    check(rows, inner, outer, dtype, bias, seed)


@pytest.mark.parametrize("inner", [2048, 4096, 8192, 12345])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3])
def test_long_rows(inner: int, dtype: torch.dtype, rows: int) -> None:
    check(rows, inner, 37, dtype, True)


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 processor")
def test_other_instruction_sets(march: str, dtype: torch.dtype) -> None:
    check(3, 77, 19, dtype, True, march=march)
    check(1, 9000, 19, dtype, True, march=march)


@pytest.mark.parametrize("march", ["native", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 processor")
def test_many_rows(march: str, dtype: torch.dtype) -> None:
    """Rows in panels, all in one go and, beyond 512, in several; chunks of columns, and what is left of them."""
    for rows, inner, outer in ((12, 300, 50), (30, 520, 16), (515, 77, 33), (1030, 9, 40)):
        check(rows, inner, outer, dtype, True, march=march)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [3, 30])
def test_with_a_residual(rows: int, threads: int) -> None:
    graph = fx.Graph()
    x, w, r = (graph.placeholder(name) for name in "xwr")
    linear = graph.call_function(LINEAR, (x, w))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (linear, r)),))
    inputs = (torch.randn(rows, 100), torch.randn(300, 100), torch.randn(rows, 300))
    step = CompiledStep(fx.GraphModule(torch.nn.Module(), graph), inputs, {}, Options(threads=threads))
    assert not step.report.foreign
    torch.testing.assert_close(step(*inputs)[0], inputs[0] @ inputs[1].T + inputs[2], atol=1e-4, rtol=1e-5)


def test_rows_in_any_layout() -> None:
    """A slice of the last token of each row: rows with a stride."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    last = graph.call_function(torch.ops.aten.slice.Tensor, (x, 1, -1))
    graph.output((graph.call_function(LINEAR, (last, w)),))
    for batch in (3, 40):
        inputs = (torch.randn(batch, 5, 20), torch.randn(6, 20))
        step = CompiledStep(fx.GraphModule(torch.nn.Module(), graph), inputs, {}, Options())
        assert not step.report.foreign
        torch.testing.assert_close(step(*inputs)[0], inputs[0][:, -1:] @ inputs[1].T)
