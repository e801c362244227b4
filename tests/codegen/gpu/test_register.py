"""The CUDA kernel of accelc::quantized_linear: what it computes (interpreted here), and how long it keeps weights."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from attention_cases import operands as operands_of_attention
from codegen_gpu import interpreted_kernels, interpreter, random_weight

from accelc.codegen.gpu import register
from accelc.ir.dialect import attention_reference
from accelc.ir.quantized import QuantizedWeight, Scheme
from accelc.ir.quantized_ops import quantized_linear, quantized_linear_reference


def operands(weight: QuantizedWeight) -> tuple:
    return weight.codes, weight.scales, weight.zeros


def test_computes_the_operation() -> None:
    weight = random_weight(Scheme.parse("int4:g64:asym"), 40, 100, 0)
    x, bias = torch.randn(2, 3, 100).to(torch.float16), torch.randn(40).to(torch.float16)
    with interpreter(interpreted_kernels()):
        got = register.quantized_linear_gpu(x, *operands(weight), bias, 4, 40)
    want = quantized_linear_reference(x, *operands(weight), bias, 4, 40)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_other_operands_take_the_reference_and_say_so_once() -> None:
    weight = random_weight(Scheme.parse("int4"), 16, 128, 0)
    x = torch.randn(2, 128)
    with pytest.warns(UserWarning, match="float32 .* has no GPU kernel"):
        got = register.quantized_linear_gpu(x, *operands(weight), None, 4, 16)
    assert torch.equal(got, quantized_linear_reference(x, *operands(weight), None, 4, 16))


@pytest.mark.parametrize("text", ["int4", "int8", "int8:g32:asym:fp16", "int4:g256"])
def test_weights_are_tiled_once_and_keep_their_values(text: str) -> None:
    from accelc.codegen.gpu import untile_weight

    weights = register.TiledWeights()
    weight = random_weight(Scheme.parse(text), 40, 300, 0)
    first = weights.of(*operands(weight), weight.scheme.bits, 40, 300)
    assert weights.of(*operands(weight), weight.scheme.bits, 40, 300) is first
    assert torch.equal(untile_weight(first).dequantize(), weight.dequantize())


def test_tiled_weights_die_with_their_codes_and_follow_writes() -> None:
    weights = register.TiledWeights()
    first, second = (random_weight(Scheme.parse("int4"), 16, 128, seed) for seed in (0, 1))
    before = weights.of(*operands(first), 4, 16, 128)
    first.codes.zero_()
    after = weights.of(*operands(first), 4, 16, 128)
    assert int(after.codes.count_nonzero()) == 0
    assert int(before.codes.count_nonzero()) > 0
    assert len(weights) == 1
    del first
    gc.collect()
    weights.of(*operands(second), 4, 16, 128)
    assert len(weights) == 1


def test_registering_leaves_cpus_alone() -> None:
    weight = random_weight(Scheme.parse("int8"), 16, 64, 0)
    x = torch.randn(2, 64)
    before = quantized_linear(x, *operands(weight), None, 8, 16)
    register.register()
    register.register()
    assert torch.equal(before, quantized_linear(x, *operands(weight), None, 8, 16))


def test_attention_that_the_device_does_not_take_runs_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from accelc.codegen.gpu import attention

    calls = []

    def refused(*_: object) -> torch.Tensor:
        calls.append(1)
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(attention, "attention_gpu", refused)
    monkeypatch.setattr(register, "REFUSED", set())
    register._announce.cache_clear()
    given = operands_of_attention([9, 3], 2, 4, 2, 40, 24)
    with pytest.warns(UserWarning, match="keys of 40 and values of 24 .*OutOfResources.*shared memory") as warned:
        got = [register.attention_cuda(*given) for _ in range(3)]
    for one in got:
        torch.testing.assert_close(one, attention_reference(*given))
    assert (len(calls), len(warned)) == (1, 1)


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, accelc.codegen.gpu.register; print('accelc.codegen.gpu.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["exact", "biased"])
@pytest.mark.parametrize("text", ["int4", "int4:g32:asym", "int8", "int8:g64:asym", "int4:row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 4096, 4096), (16, 1000, 1000), (64, 512, 2048), (100, 70, 300)]
)
def test_on_a_gpu(mode: str, text: str, dtype: torch.dtype, count: int, rows: int, columns: int) -> None:
    from accelc.codegen.gpu import Tile, tile_weight
    from accelc.codegen.gpu.quantized_gemm import quantized_gemm
    from accelc.codegen.gpu.tiles import tokens_of

    weight = random_weight(Scheme.parse(text), rows, columns, 0)
    x, residual = torch.randn(count, columns).to(dtype), torch.randn(count, rows).to(dtype)
    y = x.double() @ weight.dequantize(torch.float64).T
    want = torch.nn.functional.silu(y) + residual.double()
    for split in (1, 4):
        tile = Tile(128, max(16, tokens_of(count, "sm_90")), 8, 2, 1, split, mode)
        got = quantized_gemm(x.cuda(), tile_weight(weight).to("cuda"), None, residual.cuda(), "silu", tile=tile).cpu()
        size = y.abs().max()
        torch.testing.assert_close(got.double() / size, want / size, rtol=2**-7, atol=2**-9)
