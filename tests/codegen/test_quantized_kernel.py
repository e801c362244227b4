"""Products with weights in few bits, against the dequantized weights in float64."""

from __future__ import annotations

import pytest
import torch
from codegen_single import run_single
from hypothesis import given, settings
from hypothesis import strategies as st

from accelc.ir.quantized import GROUPS, Scheme
from accelc.passes.quantize.rounding import round_to_nearest

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Sixteen bits of the largest activation of a segment are kept."""
LINEAR = torch.ops.accelc.quantized_linear.default


def check(rows: int, inner: int, outer: int, scheme: Scheme, dtype=torch.float32, bias=False, seed=0, **how) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=g) * torch.exp(torch.randn(inner, generator=g))
    x = x.to(dtype)
    made = round_to_nearest(torch.randn(outer, inner, generator=g), scheme, clip=False)
    c = torch.randn(outer, generator=g).to(dtype) if bias else None
    got = run_single(LINEAR, x, made.codes, made.scales, made.zeros, c, scheme.bits, outer, **how)
    weight = made.dequantize(torch.float64)
    want = torch.nn.functional.linear(x.double(), weight, None if c is None else c.double())
    size = (x.double().abs() @ weight.abs().T).max()
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max() / size) < TOLERANCE[dtype]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20),
    inner=st.sampled_from([1, 7, 32, 100, 130, 513, 1024]),
    outer=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    scales=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_matches_float64(rows, inner, outer, bits, group, symmetric, scales, dtype, bias, seed) -> None:
    check(rows, inner, outer, Scheme(bits, group, symmetric, scales), dtype, bias, seed)


@pytest.mark.parametrize("text", ["int4:row", "int8:row", "int4:g32:asym", "int8:g256"])
def test_long_rows_do_not_overflow(text: str) -> None:
    scheme = Scheme.parse(text)
    x = torch.ones(2, 20000)
    made = round_to_nearest(torch.ones(16, 20000), scheme, clip=False)
    got = run_single(LINEAR, x, made.codes, made.scales, made.zeros, None, scheme.bits, 16)
    torch.testing.assert_close(got, made.dequantize().double().sum(1).float().expand(2, 16), rtol=1e-5, atol=0)


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
@pytest.mark.parametrize("text", ["int4:g64", "int8:g64:asym"])
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 processor")
def test_other_instruction_sets(march: str, text: str) -> None:
    check(3, 200, 19, Scheme.parse(text), march=march)


def test_activations_that_are_no_numbers_are_not_lost() -> None:
    made = round_to_nearest(torch.randn(20, 64), Scheme(4, 32))
    x = torch.randn(3, 64)
    x[0, 40], x[1, 3] = float("nan"), float("inf")
    got = run_single(LINEAR, x, made.codes, made.scales, None, None, 4, 20)
    assert not bool(torch.isfinite(got[:2]).any())
    assert bool(torch.isfinite(got[2]).all())
