"""Every spelling of a norm becomes one operation that computes the same; what is not a norm stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from raising import WIDTH, Around, assert_same, calls, normalised, raised, with_passes
from torch import Tensor, nn

EPS = 1e-2  # large, so that forgetting it shows


class Norm(nn.Module):
    """A body that owns a weight and a bias and computes `function(x, weight, bias)`."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return w * y.to(x.dtype)


def gemma(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return (y * (1.0 + w.float())).type_as(x)


def cast_after_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * y).to(x.dtype)


def product_and_root(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt(EPS + (x * x).mean(dim=2, keepdim=True)) * w


def power(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.pow(x.square().mean(-1, keepdim=True) + EPS, -0.5) * w


def reciprocal(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (WIDTH,), w, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spelling", "weighted", "offset"),
    [
        (llama, True, 0.0),
        (gemma, True, 1.0),
        (cast_after_weight, True, 0.0),
        (product_and_root, True, 0.0),
        (power, True, 0.0),
        (reciprocal, False, 0.0),
        (fused, True, 0.0),
    ],
)
def test_rms_norm(spelling: Callable[..., Tensor], weighted: bool, offset: float, dtype: torch.dtype) -> None:
    result = raised(Norm(spelling), "raise_norms", dtype)
    assert result.matches == 1
    assert calls(result.program) == {"aten.embedding": 1, "accelc.rms_norm": 1}
    (node,) = [n for n in result.program.graph.nodes if n.target is torch.ops.accelc.rms_norm.default]
    x, weight, eps, weight_offset = node.args
    assert x.target is torch.ops.aten.embedding.default  # before any conversion of dtype
    assert (weight is not None, eps, weight_offset) == (weighted, EPS, offset)
    assert node.meta["val"].dtype == dtype


def centred_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return w * ((x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS)) + b


def variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    return y / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * w + b


def variance_and_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + EPS) * w + b


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.float()
    mean = y.mean(-1, keepdim=True)
    y = (y - mean) * torch.rsqrt((y - mean).pow(2).mean(-1, keepdim=True) + EPS)
    return (w.float() * y).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", [centred_twice, variance, variance_and_mean, cohere])
def test_layer_norm(spelling: Callable[..., Tensor], dtype: torch.dtype) -> None:
    result = raised(Norm(spelling), "raise_norms", dtype)
    assert result.matches == 1
    assert calls(result.program) == {"aten.embedding": 1, "aten.layer_norm": 1}


def over_tokens(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w


def corrected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * w


def of_something_else(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def not_centred(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * w


@pytest.mark.parametrize("spelling", [over_tokens, corrected, of_something_else, not_centred])
def test_what_is_no_norm_stays(spelling: Callable[..., Tensor]) -> None:
    result = raised(Norm(spelling), "raise_norms")
    assert result.matches == 0
    assert not {"accelc.rms_norm", "aten.layer_norm"} & set(calls(result.program))


def test_gate_and_weight_of_each_head_stay() -> None:
    def body(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, WIDTH // 2))
        y = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + EPS) * w.view(2, WIDTH // 2)
        return y.flatten(-2) * torch.sigmoid(x)

    result = raised(Norm(body), "raise_norms")
    assert calls(result.program)["accelc.rms_norm"] == 1
    assert calls(result.program)["aten.mul"] == 2


def test_sixteen_bit_input_and_full_precision_weight() -> None:
    """The product is in fp32 then, so the norm is of the converted input."""
    model = Around(Norm(llama)).to(torch.bfloat16)
    model.body.weight.data = model.body.weight.data.float()
    before = normalised(model)
    result = with_passes(before, ["raise_norms"])[0]
    assert result.matches == 1
    assert_same(before, result.program, rounding=torch.bfloat16)  # the model rounds before it multiplies the weight


def test_meta_and_origin_are_kept() -> None:
    program = normalised(Around(Norm(llama)))
    origin = [n.meta["nn_module_stack"] for n in program.graph.nodes if n.target is torch.ops.aten.rsqrt.default]
    result = with_passes(program, ["raise_norms"])[0]
    (node,) = [n for n in result.program.graph.nodes if n.target is torch.ops.accelc.rms_norm.default]
    assert list(node.meta["nn_module_stack"]) == list(origin[0])
    assert [str(s) for s in node.meta["val"].shape[1:]] == [str(s) for s in node.args[0].meta["val"].shape[1:]]
