"""AbsorbProjections: latent attention comes out where it is modelled faster, and computes the same."""

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from accelc.capture import capture
from accelc.ir import Program
from accelc.passes import Pipeline
from accelc.passes.absorb_projections import AbsorbProjections
from accelc.passes.check_step import check_step
from accelc.passes.derive_step import DeriveStep
from accelc.passes.normalise import Normalise
from accelc.passes.raise_attention import RaiseAttention

HEADS, DEPTH, RANK, VOCABULARY = 4, 8, 6, 19


class Latent(nn.Module):
    """Keys and values are projections of a small latent; `order` says how heads and parts lie in the projection."""

    def __init__(self, order: str, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        width = HEADS * DEPTH
        self.order = order
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.query, self.down = nn.Linear(width, width), nn.Linear(width, RANK)
        self.up = nn.Linear(RANK, 2 * width, bias=bias)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, _ = x.shape
        q = self.query(x).view(b, t, HEADS, DEPTH).transpose(1, 2)
        kv = self.up(self.down(x))
        if self.order == "heads first":
            k, v = kv.view(b, t, HEADS, 2 * DEPTH).transpose(1, 2).split(DEPTH, dim=-1)
        elif self.order == "parts first":
            k, v = kv.view(b, t, 2, HEADS, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)
        else:  # the features of a head lie apart
            k, v = (p.view(b, t, DEPTH, HEADS).permute(0, 3, 1, 2) for p in kv.chunk(2, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + y.transpose(1, 2).flatten(2))


def _derive(model: nn.Module, **options: float) -> tuple[Program, Program]:
    forward = capture(model.eval(), max_length=32)
    return forward, Pipeline([Normalise(), RaiseAttention(), AbsorbProjections(**options), DeriveStep()]).run(forward)


def _absorbed(step: Program) -> int:
    return next(record.matches for record in step.history if record.name == "absorb_projections")


@pytest.mark.parametrize("order", ["heads first", "parts first", "features apart"])
def test_the_latent_is_cached_and_the_step_is_the_same(order: str) -> None:
    forward, step = _derive(Latent(order))
    assert _absorbed(step) == 1
    assert [s.bytes_per_token() for s in step.states] == [RANK * 4]
    assert max(mode.error for mode in check_step(forward, step)) < 1e-5


def test_costs_decide() -> None:
    _, slow_memory = _derive(Latent("heads first"), bytes_per_second=1e8, flops_per_second=1e13)
    _, slow_arithmetic = _derive(Latent("heads first"), bytes_per_second=1e13, flops_per_second=1e5)
    assert _absorbed(slow_memory) == 1
    # Per head 6 + 6 products a token over the latent, 8 + 8 over keys and values: absorbed in both.
    assert _absorbed(slow_arithmetic) == 1


def test_a_projection_with_a_bias_is_left_alone() -> None:
    forward, step = _derive(Latent("heads first", bias=True))
    assert _absorbed(step) == 0
    assert max(mode.error for mode in check_step(forward, step)) < 1e-5


def test_ordinary_attention_is_left_alone() -> None:
    for name in ("llama", "gpt2"):
        _, step = _derive(FAMILIES[name].build())
        assert _absorbed(step) == 0


def test_deepseek_caches_its_latent_and_rotary_part() -> None:
    model = FAMILIES["deepseek_v3"].build()
    forward, step = _derive(model)
    config = model.config
    assert _absorbed(step) == config.num_hidden_layers
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    assert [s.bytes_per_token() for s in step.states] == [latent * 4] * config.num_hidden_layers
    assert max(mode.error for mode in check_step(forward, step)) < 1e-4
