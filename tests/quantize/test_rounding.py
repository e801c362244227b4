"""Weights in few bits: packing loses nothing, and rounding stays within half a step."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from accelc.ir.errors import InputError, TokenRangeError
from accelc.ir.quantized import BITS, GROUPS, SCALES, UNIT, Scheme, pack, unpack
from accelc.ir.rounding import round_to_nearest
from accelc.quantized_linear import QuantizedEmbedding, QuantizedLinear

SCHEMES = [
    Scheme(bits, group, symmetric, dtype)
    for bits in BITS
    for group in GROUPS
    for symmetric in (True, False)
    for dtype in SCALES.values()
]


def weight_like(kind: str, rows: int, columns: int) -> Tensor:
    """Weights of a few distributions, among them those that break careless code."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    normal = torch.randn(rows, columns, generator=generator) * 0.02
    if kind == "zeros":
        normal[: rows // 2 + 1] = 0
    elif kind == "constant":
        normal[:] = -0.37
    elif kind == "positive":
        normal = normal.abs() + 1
    elif kind == "outliers":
        normal[:, ::17] *= 50
    return normal


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_packing_is_a_bijection(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    rows = data.draw(st.integers(1, 40))
    shape = (*data.draw(st.lists(st.integers(1, 3), max_size=2)), rows, UNIT * data.draw(st.integers(1, 4)))
    seed = data.draw(st.integers(0, 1 << 30))
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-3:] == (-(-rows // 16), codes.shape[-1] * bits // 32, 64)
    assert torch.equal(unpack(packed, bits, rows), codes)
    padded = -(-rows // 16) * 16
    assert torch.equal(pack(unpack(packed, bits, padded), bits), packed)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "zeros", "constant", "positive", "outliers"])
def test_full_range_rounding_is_within_half_a_step(scheme: Scheme, kind: str) -> None:
    for rows, columns in ((3, 256), (5, 200), (2, 7)):
        weight = weight_like(kind, rows, columns)
        made = round_to_nearest(weight, scheme, clip=False)
        assert made.shape == (rows, columns)
        step = made.scale_matrix.abs().repeat_interleave(scheme.padded(columns) // scheme.groups(columns), -1)
        error = (made.dequantize() - weight).abs()
        assert bool((error <= 0.5 * step[:, :columns] * (1 + 1e-4) + 1e-7).all()), error.max()


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.scale_dtype == torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "zeros", "constant", "positive", "outliers"])
def test_searching_the_range_loses_less(scheme: Scheme, kind: str) -> None:
    weight = weight_like(kind, 16, 512)
    full = (round_to_nearest(weight, scheme, clip=False).dequantize() - weight).square().sum()
    searched = (round_to_nearest(weight, scheme).dequantize() - weight).square().sum()
    assert float(searched) <= float(full) * 1.001 + 1e-9
    if kind == "normal" and scheme.bits == 4:
        assert float(searched) < 0.97 * float(full)


def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    weight = weight_like("normal", 32, 256)
    importance = torch.ones(256)
    importance[::2] = 100
    plain, weighted = (
        (round_to_nearest(weight, Scheme(4, 64), importance=i).dequantize() - weight).square().mean(0)
        for i in (None, importance)
    )
    assert float(weighted[::2].mean()) < float(plain[::2].mean())


def test_stacks_of_experts_round_like_their_matrices() -> None:
    stack = torch.stack([weight_like("normal", 6, 96), weight_like("outliers", 6, 96)])
    made = round_to_nearest(stack, Scheme(4, 32))
    assert made.shape == (2, 6, 96)
    for i in range(2):
        assert torch.equal(made.dequantize()[i], round_to_nearest(stack[i], Scheme(4, 32)).dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_schemes_read_what_they_write(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


UNKNOWN = ["int3", "int4:g33", "float8", "int4:g64:foo", "", "int8:g512", "int4:g0", "int04", None, 4, b"int4"]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_schemes_name_the_choices(text: Any) -> None:
    with pytest.raises(InputError, match="g64"):
        Scheme.parse(text)


@pytest.mark.parametrize("weight", [torch.ones(8), torch.ones(0, 8), torch.ones(8, 8, dtype=torch.int32)])
def test_what_is_no_matrix_of_floats_is_named(weight: torch.Tensor) -> None:
    with pytest.raises(InputError, match="a weight to quantize is"):
        round_to_nearest(weight, Scheme.parse("int8"))


def test_modules_refuse_what_their_padding_would_hide() -> None:
    weight = round_to_nearest(torch.randn(41, 50), Scheme.parse("int8"))
    linear, table = QuantizedLinear(weight), QuantizedEmbedding(weight, torch.float32)
    for width in (49, 51, 64):
        with pytest.raises(InputError, match=f"rows of {width} for a quantized linear of 50 columns"):
            linear(torch.ones(2, width))
    assert table(torch.tensor([0, 40])).shape == (2, 50)
    for wrong in (-1, 41, 47, 48):
        with pytest.raises(TokenRangeError, match=f"the id {wrong} lies outside a quantized table of 41 rows"):
            table(torch.tensor([0, wrong]))


def test_bits_per_weight_count_scales_zeros_and_padding() -> None:
    assert Scheme(4, 128).bits_per_weight(1024) == 4 + 16 / 128
    assert Scheme(4, 32, symmetric=False).bits_per_weight(1024) == 5.0
    assert Scheme(8, 0).bits_per_weight(1024) == 8 + 16 / 1024
    made = round_to_nearest(weight_like("normal", 16, 100), Scheme(4, 64))
    assert made.nbytes * 8 == Scheme(4, 64).bits_per_weight(100) * 1600


@pytest.mark.parametrize("text", ["int4:g32", "int8", "int4:g64:asym", "int4:row:asym"])
def test_the_operations_agree_with_the_weights(text: str) -> None:
    made = round_to_nearest(weight_like("normal", 37, 100), Scheme.parse(text))
    weight, bits = made.dequantize(), made.scheme.bits
    x, bias, ids = torch.randn(2, 3, 100), torch.randn(37), torch.tensor([[0, 36], [15, 16]])
    tensors = (made.codes, made.scales, made.zeros)
    ops = torch.ops.accelc
    torch.testing.assert_close(ops.dequantize(*tensors, bits, 37, 100, torch.float32), weight)
    torch.testing.assert_close(
        ops.quantized_linear(x, *tensors, bias, bits, 37),
        torch.nn.functional.linear(x, weight, bias),
        atol=1e-3,  # the kernel that `accelc.codegen` registers rounds x to 16 bits
        rtol=1e-3,
    )
    torch.testing.assert_close(ops.quantized_embedding(ids, *tensors, bits, 100, torch.float32), weight[ids])
    for op, arguments in (
        (ops.dequantize.default, (*tensors, bits, 37, 100, torch.bfloat16)),
        (ops.quantized_linear.default, (x, *tensors, bias, bits, 37)),
        (ops.quantized_embedding.default, (ids, *tensors, bits, 100, torch.float32)),
    ):
        torch.library.opcheck(op, arguments)
