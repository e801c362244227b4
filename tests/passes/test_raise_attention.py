"""Every spelling of attention becomes one operation that computes the same; what is not proved stays, with a note."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from raising import WIDTH, Around, assert_same, calls, normalised, raised, with_passes
from torch import Tensor, nn

NAME = "raise_attention"
HEADS, DIM = 4, 6
LEAST = torch.finfo(torch.bfloat16).min  # finite in every dtype


class Attention(nn.Module):
    """Projections to q [B, H, T, D], k and v [B, Hk, T, D] and `mix` of them, which returns [B, H, T, D]."""

    def __init__(self, mix: Callable[..., Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * DIM) for _ in range(2))
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(3 * x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.mix(q, k, v, self.sinks).transpose(1, 2).flatten(-2)


def causal(q: Tensor) -> Tensor:
    """[T, T] bool, True = visible."""
    return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()


def distance(q: Tensor) -> Tensor:
    """[H, T, T] float: ALiBi."""
    position = torch.arange(q.shape[-2])
    return torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * (position[None, :] - position[:, None])


def fused(q, k, v, sinks):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q))


def fused_causal(q, k, v, sinks):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def fused_bias(q, k, v, sinks):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=distance(q).to(q.dtype), scale=1.0)


def scaled_queries(q, k, v, sinks):
    scores = (q * DIM**-0.5) @ k.transpose(2, 3)
    return scores.masked_fill(~causal(q), float("-inf")).softmax(-1) @ v


def divided_scores(q, k, v, sinks):
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM)
    return torch.where(causal(q), scores, LEAST).softmax(-1) @ v


def added_mask_and_casts(q, k, v, sinks):
    mask = torch.zeros_like(causal(q), dtype=q.dtype).masked_fill(~causal(q), torch.finfo(q.dtype).min)
    scores = 0.4 * torch.matmul(q, k.transpose(-1, -2)) + mask
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), 0.1, training=False)
    return torch.matmul(weights, v)


def scaled_after_the_bias(q, k, v, sinks):
    scores = (q @ k.transpose(2, 3) + distance(q)) / 2.0
    return scores.masked_fill(~causal(q), LEAST).softmax(-1).to(v.dtype) @ v


def subtracted_bias(q, k, v, sinks):
    return (q @ k.transpose(2, 3) - distance(q).to(q.dtype)).softmax(-1) @ v


def soft_capped(q, k, v, sinks):
    scores = torch.tanh(q @ k.transpose(2, 3) * 0.5 / 1.5) * 1.5
    return scores.masked_fill(~causal(q), LEAST).softmax(-1) @ v


def without_its_maximum(q, k, v, sinks):
    scores = (q @ k.transpose(2, 3)).masked_fill(~causal(q), LEAST)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def with_sinks(q, k, v, sinks):
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~causal(q), LEAST)
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat([scores, column], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return F.softmax(both, dim=-1)[..., :-1] @ v


def merged(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B * H, T, D]."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3])


def batched_with_alibi(q, k, v, sinks):
    b, h, t, _ = q.shape
    alibi = (torch.arange(1, h + 1)[:, None, None] * torch.arange(t)[None, None, :]).to(q.dtype) * 0.1
    scores = torch.baddbmm(alibi.repeat(b, 1, 1), merged(q), merged(k).transpose(1, 2), beta=0.5, alpha=0.3)
    scores = scores.view(b, h, t, t).masked_fill(~causal(q), LEAST)
    return torch.bmm(scores.softmax(-1).view(b * h, t, t), merged(v)).view(b, h, t, -1)


def einsums(q, k, v, sinks):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(~causal(q), LEAST)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def keys_permuted_at_once(q, k, v, sinks):
    columns = k.transpose(1, 2).permute(0, 2, 3, 1)
    return (q @ columns).masked_fill(~causal(q), LEAST).softmax(-1) @ v


SPELLINGS = [
    fused,
    fused_causal,
    fused_bias,
    scaled_queries,
    divided_scores,
    added_mask_and_casts,
    subtracted_bias,
    soft_capped,
    without_its_maximum,
    with_sinks,
    batched_with_alibi,
    einsums,
    keys_permuted_at_once,
]


@pytest.mark.parametrize("spelling", [*SPELLINGS, scaled_after_the_bias])
def test_spelling(spelling: Callable[..., Tensor]) -> None:
    result = raised(Attention(spelling), NAME)
    assert (result.matches, result.notes) == (1, ())
    found = calls(result.program)
    assert found["accelc.full_attention"] == 1
    gone = ("softmax", "matmul", "bmm", "baddbmm", "einsum", "tanh", "scaled_dot_product_attention", "max", "amax")
    assert not {f"aten.{name}" for name in gone} & set(found)
    # q, k and v, and the result: no transposition but the model's own four, none undone by another.
    assert found["aten.transpose"] + found["aten.permute"] == 4
    node = attention_of(result.program)
    assert all(n.target is torch.ops.aten.transpose.int for n in node.args[:3])
    assert node.meta["nn_module_stack"]
    assert node.meta["val"].shape[1::2] == (HEADS, DIM)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_in_sixteen_bits(spelling: Callable[..., Tensor]) -> None:
    result = raised(Attention(spelling), NAME, torch.bfloat16)
    assert result.matches == 1


def attention_of(program):
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.accelc.full_attention.default]
    return node


def kind_of_bias(spelling: Callable[..., Tensor]) -> torch.dtype:
    return attention_of(raised(Attention(spelling), NAME).program).args[3].meta["val"].dtype


def test_masks_alone_stay_boolean() -> None:
    assert kind_of_bias(divided_scores) == torch.bool
    assert kind_of_bias(fused) == torch.bool
    assert kind_of_bias(added_mask_and_casts) == torch.float32


def test_options_are_read() -> None:
    *_, is_causal, scale, softcap = attention_of(raised(Attention(soft_capped), NAME).program).args
    assert (is_causal, softcap) == (False, 1.5)
    assert scale == pytest.approx(0.5)
    *_, is_causal, scale, softcap = attention_of(raised(Attention(fused_causal), NAME).program).args
    assert (is_causal, scale, softcap) == (True, 0.3, 0.0)


# -- grouped queries -------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).masked_fill(~causal(q), LEAST).softmax(-1) @ v


def interleaved(q, k, v, sinks):
    return plain(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


def expanded(q, k, v, sinks):
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
    return plain(q, k, v)


def expanded_before_transposing(q, k, v, sinks):
    b, _, t, d = k.shape
    k, v = (
        x.transpose(1, 2)[:, :, :, None].expand(b, t, 2, 2, d).reshape(b, t, HEADS, d).transpose(1, 2) for x in (k, v)
    )
    return plain(q, k, v)


def turned_after_expanding(q, k, v, sinks):
    """Rotary embedding of keys whose heads are repeated already, as in Falcon."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    angle = torch.arange(q.shape[2])[:, None] * torch.tensor([1.0, 0.3, 0.1]).repeat(2)
    a, b = k.chunk(2, -1)
    return plain(q, k * angle.cos() + torch.cat((-b, a), -1) * angle.sin(), v)


def natively(q, k, v, sinks):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def five_dims(q, k, v, sinks):
    b, _, t, d = q.shape
    q, k, v = q.view(b, 2, 2, t, d), k.unsqueeze(2), v.unsqueeze(2)
    return plain(q, k, v).view(b, HEADS, t, d)


def einsum_with_groups(q, k, v, sinks):
    q = q.unflatten(1, (2, 2))
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k).masked_fill(~causal(q), LEAST)
    return torch.einsum("bhgqk,bhkd->bhgqd", scores.softmax(-1), v).flatten(1, 2)


def einsum_with_groups_behind(q, k, v, sinks):
    """Groups stand behind the tokens, and sinks have a column for each head of each group."""
    b, _, t, _ = q.shape
    q, k, v = q.unflatten(1, (2, 2)).permute(0, 3, 1, 2, 4), k.transpose(1, 2), v.transpose(1, 2)
    scores = 5 * torch.tanh(torch.einsum("btgre,bsge->bgrts", q, k) * 0.35 / 5)
    scores = scores.masked_fill(~causal(scores), LEAST)
    column = sinks.view(1, 2, 2, 1, 1).expand(b, 2, 2, t, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("bgrts,bsge->btgre", weights, v).flatten(2, 3).transpose(1, 2)


@pytest.mark.parametrize(
    "spelling",
    [
        interleaved,
        expanded,
        expanded_before_transposing,
        turned_after_expanding,
        natively,
        five_dims,
        einsum_with_groups,
        einsum_with_groups_behind,
    ],
)
def test_repeated_heads_are_folded(spelling: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    before = normalised(Around(Attention(spelling, kv_heads=2)))
    result = with_passes(before, ["raise_rotary", NAME])[-1]
    assert_same(before, result.program)
    assert result.matches == 1
    _, key, value = (n.meta["val"].shape for n in attention_of(result.program).args[:3])
    assert (key[1], value[1]) == (2, 2)
    assert not {"aten.expand", "aten.repeat_interleave"} & set(calls(result.program))


@pytest.mark.parametrize(
    "spelling", [lambda q, k, v, s: plain(q, k, v), lambda q, k, v, s: plain(q, k.expand(q.shape), v.expand(q.shape))]
)
def test_one_head_for_all_queries(spelling: Callable[..., Tensor]) -> None:
    result = raised(Attention(spelling, kv_heads=1), NAME)
    assert attention_of(result.program).args[1].meta["val"].shape[1] == 1


def test_heads_that_differ_stay_apart() -> None:
    """Only the values are repeated: keys and values must have the same heads."""
    body = Attention(lambda q, k, v, s: plain(q, k, v[:, :2].repeat_interleave(2, dim=1)))
    result = raised(body, NAME)
    _, key, value = (n.meta["val"].shape for n in attention_of(result.program).args[:3])
    assert (key[1], value[1]) == (HEADS, HEADS)


def test_a_single_head_without_a_dim_of_its_own() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, DIM)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return (self.q(x) @ self.k(x).transpose(1, 2)).masked_fill(hidden, LEAST).softmax(-1) @ x

    result = raised(Single(), NAME)
    assert result.matches == 1
    assert attention_of(result.program).meta["val"].shape[1::2] == (1, WIDTH)


# -- left alone ------------------------------------------------------------------------------------------------------


def over_queries(q, k, v, sinks):
    weights = (k @ q.transpose(2, 3)).masked_fill(~causal(q).T, LEAST).softmax(-2)
    return weights.transpose(2, 3) @ v


def masked_before_capping(q, k, v, sinks):
    return torch.tanh((q @ k.transpose(2, 3)).masked_fill(~causal(q), -20.0)).softmax(-1) @ v


def biased_before_capping(q, k, v, sinks):
    return torch.tanh(q @ k.transpose(2, 3) + distance(q)).softmax(-1) @ v


def squared(q, k, v, sinks):
    return ((q @ k.transpose(2, 3)) ** 2).softmax(-1) @ v


def not_hidden(q, k, v, sinks):
    return (q @ k.transpose(2, 3)).masked_fill(~causal(q), 0.0).softmax(-1) @ v


def of_positions_alone(q, k, v, sinks):
    weights = distance(q).masked_fill(~causal(q), LEAST).softmax(-1)
    return weights @ v


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (over_queries, "softmax over dim -2"),
        (masked_before_capping, "does not hide"),
        (biased_before_capping, "tanh of scores that were masked, biased or capped"),
        (squared, "not known to belong to attention scores"),
        (not_hidden, "does not hide"),
        (of_positions_alone, "which is not a number"),
    ],
)
def test_what_cannot_be_proved_stays_with_a_reason(spelling: Callable[..., Tensor], reason: str) -> None:
    result = raised(Attention(spelling), NAME)
    assert result.matches == 0
    assert "accelc.full_attention" not in calls(result.program)
    (note,) = result.notes
    assert reason in note


def test_a_softmax_elsewhere_is_not_mentioned() -> None:
    result = raised(lambda x: x.softmax(-1), NAME)
    assert (result.matches, result.notes) == (0, ())
