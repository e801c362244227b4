"""Whose kernel multiplies many rows: the choice, what it remembers, and that both sides compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from codegen_single import single
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelc.codegen import CompiledStep, Options, choice, quantized
from accelc.codegen.choice import Choice
from accelc.ir.quantized import GROUPS, Scheme
from accelc.ir.rounding import round_to_nearest

aten, ops = torch.ops.aten, torch.ops.accelc


@pytest.fixture
def clean_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for measurements; the kernels stay where they are."""
    monkeypatch.setattr(choice, "cache_dir", lambda: tmp_path)
    return tmp_path / "choices"


def product(
    rows: int, columns: int, outer: int, dtype=torch.float32, turned: bool = False
) -> tuple[CompiledStep, list]:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, columns, generator=g).to(dtype), torch.randn(outer, columns, generator=g).to(dtype)
    gm, tensors = single(aten.mm.default, (x, w.T.contiguous())) if turned else single(aten.linear.default, (x, w))
    return CompiledStep(gm, tensors, {}, Options()), tensors


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(2, 40),
    inner=st.sampled_from([7, 32, 130, 513]),
    outer=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_dequantized_for_torch(rows, inner, outer, bits, group, symmetric, bias, dtype) -> None:
    g = torch.Generator().manual_seed(rows)
    scheme = Scheme(bits, group, symmetric, torch.float32)
    x = torch.randn(rows, inner, generator=g).to(dtype)
    made = round_to_nearest(torch.randn(outer, inner, generator=g), scheme)
    c = torch.randn(outer, generator=g).to(dtype) if bias else None
    gm, tensors = single(
        ops.quantized_linear.default, (x, made.codes, made.scales, made.zeros, c, made.scheme.bits, made.rows)
    )
    got = CompiledStep(gm, tensors, {}, Options(gemm_rows=1))(*tensors)[0]
    weight = made.dequantize(torch.float64)
    want = torch.nn.functional.linear(x.double(), weight, None if c is None else c.double())
    size = float((x.double().abs() @ weight.abs().T).max()) + 1
    assert float((got.double() - want).abs().max()) <= (1e-5 if dtype is torch.float32 else 1e-2) * size


def test_a_weight_is_dequantized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "PIECE", 100 * 4 * 32)  # two blocks of rows
    made = round_to_nearest(torch.randn(100, 100), Scheme(4, 32))
    x = torch.randn(9, 100)
    gm, tensors = single(ops.quantized_linear.default, (x, made.codes, made.scales, None, None, 4, 100))
    step = CompiledStep(gm, tensors, {}, Options(gemm_rows=1))
    torch.testing.assert_close(step(*tensors)[0], x @ made.dequantize().T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("text", ["int8", "int8:g32:asym", "int4", "int4:g64:asym:fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_dequantizes(text: str, dtype: torch.dtype) -> None:
    made = round_to_nearest(torch.randn(37, 300), Scheme.parse(text))
    arguments = (made.codes, made.scales, made.zeros, made.scheme.bits, made.rows, made.columns, dtype)
    gm, tensors = single(ops.dequantize.default, arguments)
    step = CompiledStep(gm, tensors, {}, Options())
    assert not step.report.foreign
    torch.testing.assert_close(step(*tensors)[0], made.dequantize(dtype))


@pytest.mark.parametrize("turned", [False, True])
def test_measured_once_for_all_processes(clean_cache: Path, monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    monkeypatch.setattr(Choice, "_seconds", lambda self, trial: (2.0, 1.0))
    step, tensors = product(70, 300, 300, turned=turned)
    (name, text), *more = step.report.products.items()
    assert not more
    assert "128x300 float32" in name
    assert text == "torch, 0.50 of the other's time"

    def never(self: Choice, trial: object) -> tuple[float, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(Choice, "_seconds", never)
    again, _ = product(66, 300, 300, turned=turned)  # the same power of two
    assert again.report.products == step.report.products
    (file,) = clean_cache.iterdir()
    file.write_text("{}")
    monkeypatch.setattr(Choice, "_seconds", lambda self, trial: (1.0, 2.0))
    with pytest.warns(UserWarning, match="rebuilding the unreadable cache entry"):
        mended, tensors = product(70, 300, 300, turned=turned)
    assert mended.report.products[name].startswith("ours")
    x, w = tensors
    torch.testing.assert_close(mended(*tensors)[0], x @ (w if turned else w.T), atol=1e-3, rtol=1e-4)


def test_few_rows_and_small_products_are_ours_unmeasured(clean_cache: Path) -> None:
    for sizes in ((4, 2048, 1024), (64, 64, 64)):
        step, _ = product(*sizes)
        assert not step.report.products
    assert not clean_cache.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_measurement(clean_cache: Path, dtype: torch.dtype) -> None:
    step, (x, w) = product(33, 513, 300, dtype)
    assert len(step.report.products) == 1
    assert len(list(clean_cache.iterdir())) == 1
    want = x.double() @ w.double().T
    assert float((step(x, w)[0].double() - want).abs().max()) <= 1e-2 * float(want.abs().max())


@pytest.mark.parametrize("piece", [2 << 20, 513 * 4 * 16])
def test_a_real_measurement_of_codes(clean_cache: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(quantized, "PIECE", piece)  # at once, and a block at a time
    made = round_to_nearest(torch.randn(300, 513), Scheme(4, 32, False))
    x, bias = torch.randn(33, 513), torch.randn(300)
    gm, tensors = single(ops.quantized_linear.default, (x, made.codes, made.scales, made.zeros, bias, 4, 300))
    step = CompiledStep(gm, tensors, {}, Options())
    assert len(step.report.products) == 1
    want: Tensor = x.double() @ made.dequantize(torch.float64).T + bias.double()
    assert float((step(*tensors)[0].double() - want).abs().max()) <= 1e-3 * float(want.abs().max())
