"""HQQ and GPTQ against plain rounding, by the errors that they are made to reduce."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accelc.ir.errors import InputError
from accelc.ir.quantized import QuantizedWeight, Scheme, by_group
from accelc.ir.rounding import round_to_nearest
from accelc.passes.quantize.gptq import gptq
from accelc.passes.quantize.half_quadratic import NORM, half_quadratic


def correlated_inputs(columns: int, tokens: int = 2048) -> Tensor:
    """Inputs [T, K] with correlated columns of very different sizes, as hidden states are."""
    generator = torch.Generator().manual_seed(columns)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) @ mix * sizes


@pytest.mark.parametrize("text", ["int4:g64", "int4:g128:asym", "int4:row", "int8:g32", "int4:g32:fp32"])
@pytest.mark.parametrize("columns", [256, 200])
def test_gptq_changes_the_outputs_less(text: str, columns: int) -> None:
    scheme = Scheme.parse(text)
    weight = torch.randn(96, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    x = correlated_inputs(columns)
    other = correlated_inputs(columns + 0)  # same distribution; what matters is that the Hessian describes it
    expected = other @ weight.T
    made = {
        "gptq": gptq(weight, x.T @ x / len(x), scheme),
        "rounded": round_to_nearest(weight, scheme),
    }
    error = {name: float((other @ m.dequantize().T - expected).square().mean()) for name, m in made.items()}
    assert made["gptq"].codes.shape == made["rounded"].codes.shape
    assert error["gptq"] < 0.8 * error["rounded"]


def test_gptq_of_independent_inputs_is_rounding_by_importance() -> None:
    """Without correlation nothing can be made good elsewhere."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    diagonal = torch.rand(128, generator=torch.Generator().manual_seed(2)) + 0.1
    made = gptq(weight, torch.diag(diagonal), Scheme(4, 32))
    rounded = round_to_nearest(weight, Scheme(4, 32), importance=diagonal)
    assert torch.equal(made.dequantize(), rounded.dequantize())


def test_gptq_bears_inputs_that_are_always_zero_and_few_samples() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(128, tokens=20)
    x[:, 5:9] = 0
    made = gptq(weight, x.T @ x / len(x), Scheme(4, 64))
    assert bool(torch.isfinite(made.dequantize()).all())
    step = made.scales.float().abs().max()
    assert float((made.dequantize() - weight)[:, 5:9].abs().max()) < 4 * float(step)


@pytest.mark.parametrize("hessian", [torch.eye(3), torch.full((8, 8), float("nan"))])
def test_gptq_names_a_bad_hessian(hessian: Tensor) -> None:
    with pytest.raises(InputError, match="Hessian"):
        gptq(torch.randn(4, 8), hessian, Scheme(4, 32))


@pytest.mark.parametrize("text", ["int4:g64:asym", "int4:g64", "int4:g32", "int4:g128:asym:fp32", "int8:g64:asym"])
def test_half_quadratic_lowers_the_robust_error(text: str) -> None:
    """On weights with heavy tails, group by group, against the range that "rtn" finds."""
    scheme = Scheme.parse(text)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 512, generator=generator) * 0.02
    weight = weight * (1 + 4 * (torch.rand(64, 512, generator=generator) < 0.01))

    def norms(made: QuantizedWeight) -> torch.Tensor:
        return by_group(made.dequantize() - weight, scheme).abs().pow(NORM).sum(-1)

    found, searched = norms(half_quadratic(weight, scheme)), norms(round_to_nearest(weight, scheme))
    assert bool((found <= searched * 1.001).all())
    assert float(found.sum()) < float(searched.sum()) or scheme.bits == 8
    assert float(found.sum()) <= 1.001 * float(norms(round_to_nearest(weight, scheme, clip=False)).sum())


def test_half_quadratic_bears_zeros_and_constants() -> None:
    weight = torch.zeros(4, 128)
    weight[2:] = 0.3
    for text in ("int4:g64", "int4:g64:asym"):
        assert torch.allclose(half_quadratic(weight, Scheme.parse(text)).dequantize(), weight, atol=2e-3)
