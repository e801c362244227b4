"""Attention to the keys that a top-k picks: derived where the picks only mark a mask, refused where they do more."""

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor, nn

from accelc.capture import capture
from accelc.ir import Program
from accelc.ir.errors import CheckError, DeriveError
from accelc.passes.check_step import check_step
from accelc.passes.step.sizes import Size, Symbols
from accelc.passes.tree_attention import TreeAttention
from accelc.pipeline import example_inputs, step_pipeline

VOCABULARY, WIDTH, LENGTH = 29, 16, 32
Mask = Callable[[Tensor, Tensor, int], Tensor]


class Sparse(nn.Module):
    """One attention layer whose mask is made of scores [B, T, T] and the causal mask [T, T]; `keep` keys a query."""

    def __init__(self, mask: Mask, keep: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.mask, self.keep = mask, keep
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.pick_query, self.pick_key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for parameter in self.parameters():
            parameter.data.normal_(std=0.6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        t = ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        scores = (self.pick_query(x) @ self.pick_key(x).transpose(1, 2)).masked_fill(~causal, float("-inf"))
        mask = causal & self.mask(scores, causal, min(self.keep, t))
        q, k, v = (p(x)[:, None] for p in (self.query, self.key, self.value))
        return self.head(x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])[:, 0])


def marked(scores: Tensor, causal: Tensor, keep: int) -> Tensor:
    picked = scores.topk(keep, dim=-1).indices.to(torch.int32)
    return ~torch.ones_like(scores, dtype=torch.bool).scatter(-1, picked.long(), False)


def lowest(scores: Tensor, causal: Tensor, keep: int) -> Tensor:
    picked = scores.masked_fill(~causal, float("inf")).topk(keep, dim=-1, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picked, True)


def compared_with_positions(scores: Tensor, causal: Tensor, keep: int) -> Tensor:
    """Indices as positions: right in the forward, wrong for slots that do not hold their own number."""
    picked = scores.topk(keep, dim=-1).indices
    return (torch.arange(scores.shape[-1])[:, None] - picked.amax(-1, keepdim=True)) < 1000


def over_threshold(scores: Tensor, causal: Tensor, keep: int) -> Tensor:
    return scores >= scores.topk(keep, dim=-1).values.amin(-1, keepdim=True)


def marked_by_token(scores: Tensor, causal: Tensor, keep: int) -> Tensor:
    """Marks at places that are no picks."""
    places = (scores[..., None, :].amax(-1) > 0).long()
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, places, False)


def derive(mask: Mask, keep: int) -> tuple[Program, Program]:
    forward = capture(Sparse(mask, keep), max_length=LENGTH)
    return forward, step_pipeline([TreeAttention()]).run(forward)


@pytest.mark.parametrize("mask", [marked, lowest])
@pytest.mark.parametrize("keep", [4, 20, 3 * LENGTH])
def test_a_query_attends_to_the_keys_it_picks(mask: Mask, keep: int) -> None:
    forward, step = derive(mask, keep)
    modes = check_step(forward, step, length=LENGTH)
    assert "tree" in [mode.name for mode in modes]


def test_few_slots_are_enough() -> None:
    """Fewer slots than keys to pick: all are picked."""
    forward, _ = derive(marked, 28)
    step_pipeline().run(forward, verify=example_inputs)


def test_the_check_sees_another_number_of_picks() -> None:
    forward, step = derive(marked, 4)
    (count,) = (node for node in step.graph.nodes if node.target is torch.sym_min)
    count.args = (3, count.args[1])
    step.module.recompile()
    with pytest.raises(CheckError):
        check_step(forward, step, length=LENGTH)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (compared_with_positions, "something else than a mask"),
        (over_threshold, "something else than a mask"),
        (marked_by_token, "not picked by a top-k"),
    ],
)
def test_other_uses_of_picks_are_refused(mask: Mask, reason: str) -> None:
    with pytest.raises(DeriveError, match=reason):
        derive(mask, 4)


BATCH, TIME = sympy.Symbol("b", integer=True, positive=True), sympy.Symbol("t", integer=True, positive=True)


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        (3 * BATCH * TIME + 2 * TIME, 64, Size(time=2, rows=3)),
        (sympy.Max(0, TIME), 64, Size(time=1)),
        (sympy.Min(8, TIME), 64, Size(const=8)),
        (sympy.Min(8, TIME), 8, Size(time=1)),
        (sympy.Min(2048, TIME), 1024, Size(time=1)),
        (sympy.Min(2048, TIME), 4096, Size(const=2048)),  # the change lies beyond all short lengths
        (sympy.Max(0, 128 - TIME), 100, Size(const=128, time=-1)),
        (sympy.Max(0, 128 - TIME), 4096, Size(const=0)),
        (TIME**2, 64, None),
        (TIME + sympy.Mod(-TIME, 8), 64, None),
        (sympy.floor(TIME / 2), 64, None),
    ],
    ids=str,
)
def test_sizes_hold_for_all_lengths_or_for_the_longest(size: sympy.Expr, longest: int, expected: Size | None) -> None:
    assert Symbols(BATCH, TIME, longest).size(size) == expected
