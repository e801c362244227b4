"""Gates become one operation, spelled-out activations are named, and what is neither stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from raising import WIDTH, calls, raised
from torch import Tensor, nn

NAME = "raise_gated_activation"


class Mlp(nn.Module):
    """One projection to gate and up, and an activation between them."""

    def __init__(self, activation: Callable[[Tensor], Tensor], *, fused: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.both = nn.Linear(WIDTH, 48)
        self.activation, self.fused = activation, fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.both(x * 4).chunk(2, dim=-1)
            return up * self.activation(gate)
        return self.activation(self.gate(x * 4)) * self.up(x)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (F.relu, "relu"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: x * torch.sigmoid(x), "silu"),
    ],
)
def test_gate(activation: Callable[[Tensor], Tensor], kind: str, fused: bool) -> None:
    result = raised(Mlp(activation, fused=fused), NAME)
    assert "1 gates" in result.notes
    (node,) = [n for n in result.program.graph.nodes if n.target is torch.ops.accelc.gated_activation.default]
    assert node.args[2] == kind
    assert not {f"aten.{name}" for name in ("silu", "gelu", "relu", "sigmoid")} & set(calls(result.program))


@pytest.mark.parametrize("activation", [F.silu, lambda x: F.silu(x.float()).to(x.dtype)])
def test_gate_in_sixteen_bits(activation: Callable[[Tensor], Tensor]) -> None:
    result = raised(Mlp(activation, fused=False), NAME, torch.bfloat16)
    assert result.matches == 1
    assert "aten.silu" not in calls(result.program)


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def bloom_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "approximate"), [(new_gelu, "tanh"), (bloom_gelu, "tanh"), (erf_gelu, "none")])
def test_spelled_out_gelu_is_named(
    activation: Callable[[Tensor], Tensor], approximate: str, dtype: torch.dtype
) -> None:
    result = raised(lambda x: activation(x * 3), NAME, dtype)
    assert result.matches == 1
    (node,) = [n for n in result.program.graph.nodes if n.target is torch.ops.aten.gelu.default]
    assert node.kwargs.get("approximate", "none") == approximate
    assert calls(result.program) == {"aten.embedding": 1, "aten.mul": 1, "aten.gelu": 1}


def test_spelled_out_gelu_then_gate() -> None:
    result = raised(Mlp(new_gelu, fused=False), NAME)
    assert result.notes == ("1 gelu_tanh spelled out", "1 gates")
    (node,) = [n for n in result.program.graph.nodes if n.target is torch.ops.accelc.gated_activation.default]
    assert node.args[2] == "gelu_tanh"


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.relu(x) * F.relu(x),  # squared relu
        lambda x: torch.sigmoid(x.mean(-1, keepdim=True)) * x,  # one gate for a whole token
        lambda x: x * torch.sigmoid(1.702 * x),  # another slope
        lambda x: F.silu(x) * 2.0,
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.05 * x**3))),  # other constants
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x + 1) ** 3))),
    ],
)
def test_what_is_neither_stays(body: Callable[[Tensor], Tensor]) -> None:
    result = raised(body, NAME)
    assert result.matches == 0
    assert not {"accelc.gated_activation", "aten.gelu"} & set(calls(result.program))
