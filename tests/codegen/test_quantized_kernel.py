"""Products with weights in few bits, against the dequantized weights in float64."""

from __future__ import annotations

import pytest
import torch
from codegen_single import single
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelc.codegen import CompiledStep, Options
from accelc.codegen.errors import StepIndexError
from accelc.ir.errors import InputError
from accelc.ir.quantized import GROUPS, QuantizedWeight, Scheme
from accelc.ir.rounding import round_to_nearest

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Sixteen bits of the largest activation of a segment are kept."""
LINEAR = torch.ops.accelc.quantized_linear.default
X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
MARCHES = ("native", "x86-64-v3", "x86-64") if X86 else ("native",)
"""The builds that this machine can run: its own, AVX2 and plain."""


def check(rows: int, inner: int, outer: int, scheme: Scheme, dtype=torch.float32, bias=False, seed=0, **how) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=g) * torch.exp(torch.randn(inner, generator=g))
    x = x.to(dtype)
    made = round_to_nearest(torch.randn(outer, inner, generator=g), scheme, clip=False)
    c = torch.randn(outer, generator=g).to(dtype) if bias else None
    tolerance = TOLERANCE[dtype] if how.get("activation_bits", 16) == 16 else 2e-2
    compare(x, made, c, tolerance, **how)


def compare(x: Tensor, made: QuantizedWeight, bias: Tensor | None, tolerance: float, **how) -> None:
    """Errors are relative to what the products that are summed could give: sums can cancel."""
    got = run(x, made, bias, **how)
    weight = made.dequantize(torch.float64)
    want = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    size = (x.double().abs() @ weight.abs().T).max()
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= tolerance * float(size)


def run(x: Tensor, made: QuantizedWeight, bias: Tensor | None = None, **options) -> Tensor:
    gm, tensors = single(LINEAR, (x, made.codes, made.scales, made.zeros, bias, made.scheme.bits, made.rows))
    step = CompiledStep(gm, tensors, {}, Options(**options))
    assert not step.report.foreign
    return step(*tensors)[0]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    inner=st.sampled_from([1, 7, 32, 100, 130, 513, 1024]),
    outer=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    scales=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    activation_bits=st.sampled_from([16, 8]),
    march=st.sampled_from(MARCHES),
    seed=st.integers(0, 999),
)
def test_matches_float64(
    rows, inner, outer, bits, group, symmetric, scales, dtype, bias, activation_bits, march, seed
) -> None:
    scheme = Scheme(bits, group, symmetric, scales)
    check(rows, inner, outer, scheme, dtype, bias, seed, activation_bits=activation_bits, march=march)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_any_number_of_rows(march: str, bits: int, activation_bits: int) -> None:
    for rows in range(1, 66):
        check(rows, 64, 40, Scheme(bits, 32), march=march, activation_bits=activation_bits, seed=rows)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("text", ["int4:row", "int8:row", "int4:g32:asym", "int8:g256", "int4:g256"])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_the_largest_sums_do_not_overflow(march: str, text: str, activation_bits: int) -> None:
    """All activations and all codes as large as they can be."""
    scheme = Scheme.parse(text)
    made = round_to_nearest(torch.ones(16, 20000), scheme, clip=False)
    largest = QuantizedWeight(scheme, made.codes | 255, made.scales, made.zeros, 16, 20000)
    for weight in (made, largest):
        for value in (1.0, -1.0):
            x = torch.full((2, 20000), value)
            compare(x, weight, None, 1e-5, march=march, activation_bits=activation_bits)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_huge_and_tiny_activations(march: str, bits: int, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(3)
    made = round_to_nearest(torch.randn(20, 160, generator=g) * 1e-3, Scheme(bits, 32, symmetric, torch.float32))
    x = torch.randn(6, 160, generator=g)
    for factor in (1e37, 1e-30):
        compare(x / x.abs().max() * factor, made, None, 1e-4, march=march)
    # Segments of rows of their own sizes, one of them zero, and one whose values have no fp32 inverse.
    sizes = torch.tensor([1e30, 1e-20, 0.0, 1.0, 1e-38, 1e-3])
    x = x * sizes[:, None]
    x[3, 32:64] = 0.0
    got = run(x, made, march=march)
    want = x.double() @ made.dequantize(torch.float64).T
    for row in (0, 1, 2, 3, 5):
        assert float((got[row].double() - want[row]).abs().max()) <= 1e-4 * float(want[row].abs().max())
    assert float(got[4].abs().max()) < 1e-36


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_that_are_no_numbers_are_not_lost(march: str, bits: int, symmetric: bool) -> None:
    made = round_to_nearest(torch.randn(20, 64), Scheme(bits, 32, symmetric))
    for activation_bits in (16, 8):
        x = torch.randn(3, 64)
        x[0, 40], x[1, 3] = float("nan"), float("-inf")
        got = run(x, made, march=march, activation_bits=activation_bits)
        assert bool(torch.isnan(got[:2]).all())
        assert bool(torch.isfinite(got[2]).all())


def test_eight_bits_of_an_activation_lose_and_sixteen_do_not() -> None:
    g = torch.Generator().manual_seed(5)
    made = round_to_nearest(torch.randn(64, 1024, generator=g), Scheme(4, 128))
    x = torch.randn(8, 1024, generator=g)
    want = x.double() @ made.dequantize(torch.float64).T
    errors = [float((run(x, made, activation_bits=bits) - want).norm() / want.norm()) for bits in (16, 8)]
    assert errors[0] < 1e-4
    assert 1e-3 < errors[1] < 2e-2


def test_number_of_threads_does_not_change_results() -> None:
    made = round_to_nearest(torch.randn(300, 512), Scheme(4, 64))
    x = torch.randn(9, 512)
    assert torch.equal(run(x, made, threads=1), run(x, made, threads=2))


def test_other_bits_of_an_activation_are_refused() -> None:
    with pytest.raises(InputError, match="activation_bits=4"):
        Options(activation_bits=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("text", ["int8", "int4:g32:asym", "int4:g128", "int8:g64:fp16"])
def test_rows_of_a_table_are_what_the_codes_stand_for(text: str, march: str) -> None:
    g = torch.Generator().manual_seed(0)
    made = round_to_nearest(torch.randn(37, 300, generator=g), Scheme.parse(text))
    ids = torch.tensor([[0, 36, 15], [16, 36, 1]])
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (ids, made.codes, made.scales, made.zeros, made.scheme.bits, 300, dtype)
        gm, tensors = single(torch.ops.accelc.quantized_embedding.default, arguments)
        step = CompiledStep(gm, tensors, {}, Options(march=march))
        assert not step.report.foreign
        assert torch.equal(step(*tensors)[0], made.dequantize(dtype)[ids])


def test_rows_outside_a_table_are_refused() -> None:
    made = round_to_nearest(torch.randn(32, 32), Scheme.parse("int8"))
    arguments = (torch.tensor([32]), made.codes, made.scales, made.zeros, 8, 32, torch.float32)
    gm, tensors = single(torch.ops.accelc.quantized_embedding.default, arguments)
    with pytest.raises(StepIndexError):
        CompiledStep(gm, tensors, {}, Options())(*tensors)
