"""Products with weights in few bits by the Triton kernels, interpreted, against the dequantized weights in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from codegen_gpu import interpreted_kernels, interpreter, random_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelc.codegen.gpu import Tile, TiledWeight, tile_weight
from accelc.codegen.gpu.errors import KernelConfigError, KernelInputError
from accelc.codegen.gpu.quantized_gemm import quantized_gemm
from accelc.ir.quantized import BITS, GROUPS, SCALES, QuantizedWeight, Scheme

DTYPES = (torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "none": lambda y: y,
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}
SMALL = Tile(64, 16, 4, 2, 1, 1, "exact")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted_kernels()


@pytest.fixture(autouse=True)
def _interpreted(kernels: ModuleType) -> Iterator[None]:
    with interpreter(kernels):
        yield


def reference(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The product in float64, and a bound of what its sums in fp32 and its rounding to x's dtype may lose.

    fp32 sums of K products lose at most K * 2^-24 of the sum of magnitudes; what stands in the mantissa with a code
    (1024 + q at most, for q - 8 or q - 128) enlarges these up to 1032 times in fp16 and 136 in bf16. Activations have
    slopes of at most 1.13. The interpreter truncates what it stores as bf16, where a GPU rounds: 2^-7, not 2^-8.
    """
    dense = weight.dequantize(torch.float64)
    y = x.double() @ dense.T + (0 if bias is None else bias.double())
    out = ACTIVATIONS[activation](y) + (0 if residual is None else residual.double())
    scales = weight.scale_matrix.double().amax(1)
    largest = 1152 + weight.scheme.levels if x.dtype == torch.float16 else 256 + weight.scheme.levels
    magnitude = x.double().abs().sum(1, keepdim=True) * scales * largest
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}[x.dtype]
    bound = rounding * out.abs() + 1.13 * 2.0**-24 * (8 + x.shape[1] ** 0.5) * magnitude + 2.0**-20
    return out, bound


def operands(m: int, scheme: Scheme, n: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g).to(dtype)
    return x, torch.randn(n, generator=g).to(dtype), torch.randn(m, n, generator=g).to(dtype)


def check(m, n, k, scheme, dtype, tile, bias=True, residual=True, activation="none", seed=0) -> None:
    weight = random_weight(scheme, n, k, seed)
    x, b, r = operands(m, scheme, n, k, dtype, seed)
    b, r = b if bias else None, r if residual else None
    got = quantized_gemm(x, tile_weight(weight), b, r, activation, tile=tile)
    want, bound = reference(x, weight, b, r, activation)
    assert (got.shape, got.dtype) == ((m, n), dtype)
    excess = (got.double() - want).abs() / bound
    assert float(excess.max()) <= 1, f"{float(excess.max())} times the bound"


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 140),
    k=st.integers(1, 400),
    scheme=st.builds(
        Scheme, st.sampled_from(BITS), st.sampled_from(GROUPS), st.booleans(), st.sampled_from([*SCALES.values()])
    ),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(["exact", "biased"]),
    split=st.sampled_from([1, 2, 3]),
    unroll=st.sampled_from([1, 2]),
    activation=st.sampled_from([*ACTIVATIONS]),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_matches_float64(
    m, n, k, scheme, dtype, mode, split, unroll, activation, bias, residual, seed
) -> None:
    tile = Tile(64, 8 if m <= 8 else 16, 4, 2, unroll, split, mode)
    check(m, n, k, scheme, dtype, tile, bias, residual, activation, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["exact", "biased"])
@pytest.mark.parametrize("text", ["int4", "int8", "int4:g64:asym", "int8:g32:asym"])
def test_schemes(text: str, mode: str, dtype: torch.dtype) -> None:
    check(3, 70, 200, Scheme.parse(text), dtype, replace(SMALL, mode=mode))


@pytest.mark.parametrize(
    "tile",
    [Tile(128, 8, 4, 3, 2, 1, "biased"), Tile(128, 16, 8, 2, 1, 2, "exact"), Tile(256, 64, 8, 2, 1, 1, "biased")],
    ids=str,
)
def test_tiles(tile: Tile) -> None:
    check(tile.tokens, 200, 256, Scheme.parse("int4:g64:asym"), torch.bfloat16, tile, activation="silu")


def test_more_rows_than_a_tile_are_taken_in_turns() -> None:
    check(37, 20, 128, Scheme.parse("int4"), torch.bfloat16, SMALL)


def test_a_tile_is_chosen() -> None:
    check(2, 20, 128, Scheme.parse("int4"), torch.bfloat16, None)


def test_split_sums_are_those_of_one_pass_but_for_rounding_and_repeat_bit_for_bit() -> None:
    weight = tile_weight(random_weight(Scheme.parse("int4"), 64, 512, 3))
    x = torch.randn(4, 512).to(torch.bfloat16)
    first = quantized_gemm(x, weight, tile=replace(SMALL, split=4))
    assert torch.equal(first, quantized_gemm(x, weight, tile=replace(SMALL, split=4)))
    torch.testing.assert_close(first, quantized_gemm(x, weight, tile=SMALL), rtol=2**-7, atol=2**-7)


def test_rows_may_be_strided_and_nan_stays_in_its_row() -> None:
    weight = random_weight(Scheme.parse("int4"), 64, 128, 5)
    x = torch.randn(3, 256).to(torch.bfloat16)[:, :128]
    x[1, 7] = float("nan")
    got = quantized_gemm(x, tile_weight(weight), activation="relu", tile=SMALL)
    assert bool(got[1].isnan().all())
    want, bound = reference(x[::2], weight, None, None, "relu")
    assert bool(((got[::2].double() - want).abs() <= bound).all())


@pytest.mark.parametrize("what", ["code", "scale", "zero"])
def test_the_comparison_sees_one_wrong_value(what: str) -> None:
    """Negative control: one code, scale or zero that differs must break the bound."""
    weight = random_weight(Scheme.parse("int4:g64:asym"), 64, 256, 7)
    tiled = tile_weight(weight)
    wrong = {"codes": tiled.codes.clone(), "scales": tiled.scales.clone(), "zeros": tiled.zeros.clone()}
    if what == "code":
        wrong["codes"][0, 1, 100] ^= 1 << 3
    else:
        wrong[f"{what}s"][0, 2, 5] *= 1.5
    x = torch.randn(2, 256).to(torch.bfloat16).abs() + 0.5
    got = quantized_gemm(x, replace(tiled, **wrong), tile=SMALL)
    want, bound = reference(x, weight, None, None, "none")
    outside = ((got.double() - want).abs() > bound).any(0)
    assert int(outside.sum()) == 1, "exactly the row with the wrong value is out of bounds"


def test_empty_operands_give_an_empty_result() -> None:
    weight = tile_weight(random_weight(Scheme(4, 32), 16, 32, 0))
    assert quantized_gemm(torch.empty(0, 32, dtype=torch.bfloat16), weight).shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 33, dtype=torch.bfloat16)}, r"\[M, K\]"),
        ({"x": torch.zeros(2, 32)}, "bfloat16 or float16"),
        ({"x": torch.zeros(32, 2, dtype=torch.bfloat16).T}, "contiguous"),
        ({"bias": torch.zeros(17)}, "bias must be"),
        ({"bias": torch.zeros(16, dtype=torch.int32)}, "floating point"),
        ({"residual": torch.zeros(1, 16)}, "residual must be"),
        ({"activation": "swish"}, "no activation 'swish'"),
    ],
)
def test_operands_that_do_not_fit_are_named(change: dict, words: str) -> None:
    weight: TiledWeight = tile_weight(random_weight(Scheme(4, 32), 16, 32, 0))
    given_: dict = {"x": torch.zeros(2, 32, dtype=torch.bfloat16), **change}
    with pytest.raises(KernelInputError, match=words):
        quantized_gemm(weight=weight, **given_)


@pytest.mark.parametrize("wrong", [{"rows": 96}, {"tokens": 12}, {"warps": 16}, {"split": 0}, {"mode": "fast"}])
def test_tiles_that_do_not_exist_are_refused(wrong: dict) -> None:
    with pytest.raises(KernelConfigError, match="no such tile"):
        replace(SMALL, **wrong)
