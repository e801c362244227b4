"""DeriveStep on small hand-written modules: what is cached, what is looked up, what is refused, and that it computes
the same.
"""

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from accelc.capture import capture
from accelc.ir import Program
from accelc.ir.errors import AccelcError, CheckError, DeriveError, NotCausalError
from accelc.passes import Pipeline
from accelc.passes.check_step import check_step
from accelc.passes.derive_step import DeriveStep
from accelc.passes.normalise import Normalise
from accelc.passes.raise_attention import RaiseAttention
from accelc.passes.tree_attention import TreeAttention
from accelc.pipeline import step_pipeline

VOCABULARY, WIDTH, HEADS, LENGTH = 23, 16, 4, 32


class Mixer(nn.Module):
    """Embedding, one residual mixing function, head."""

    def __init__(
        self, mix: Callable[["Mixer", Tensor], Tensor], *, positions: int = LENGTH, key_width: int = WIDTH
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.position = nn.Embedding(positions, WIDTH)
        self.query, self.key, self.value = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, key_width),
            nn.Linear(WIDTH, key_width),
        )
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 64, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool)))
        self.mix = mix
        for parameter in self.parameters():
            parameter.data.normal_(std=0.6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.mix(self, x))


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    y = nn.functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
    return y.transpose(1, 2).flatten(2)


def plain(m: Mixer, x: Tensor) -> Tensor:
    return attend(heads(m.query(x)), heads(m.key(x)), heads(m.value(x)), is_causal=True)


def fused(m: Mixer, x: Tensor) -> Tensor:
    q, k, v = m.fused(x).split(WIDTH, dim=-1)
    return attend(heads(q), heads(k), heads(v), is_causal=True)


def grouped(m: Mixer, x: Tensor) -> Tensor:
    k, v = (heads(p(x), 2).repeat_interleave(2, dim=1) for p in (m.key, m.value))
    return attend(heads(m.query(x)), k, v, is_causal=True)


def matmuls(m: Mixer, x: Tensor) -> Tensor:
    """Scores are edited after the softmax, so no pass may raise this to attention."""
    q, k, v = heads(m.query(x)), heads(m.key(x)), heads(m.value(x))
    t = x.shape[1]
    scores = (q @ k.transpose(-1, -2)).masked_fill(~m.mask[:t, :t], float("-inf"))
    weights = scores.softmax(-1)
    return ((weights * weights) @ v).transpose(1, 2).flatten(2)


def rank_two(m: Mixer, x: Tensor) -> Tensor:
    """Keys and values come out of two numbers a token."""
    k, v = heads(m.up(m.down(x)), 4), heads(m.value(x))
    return attend(heads(m.query(x)).repeat(1, 1, 1, 4), k, v, is_causal=True)


def learned_positions(m: Mixer, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1], device=x.device)
    return plain(m, x + m.position(positions))


def upper_triangle(m: Mixer, x: Tensor) -> Tensor:
    t = x.shape[1]
    bias = torch.full((t, t), float("-inf"), device=x.device).triu(1)
    return attend(heads(m.query(x)), heads(m.key(x)), heads(m.value(x)), attn_mask=bias)


def distances(m: Mixer, x: Tensor) -> Tensor:
    """A bias that no family covers: the square root of the distance."""
    t = torch.arange(x.shape[1], device=x.device)
    distance = t[:, None] - t[None, :]
    bias = torch.where(distance >= 0, -distance.clamp(min=0).float().sqrt(), float("-inf"))
    return attend(heads(m.query(x)), heads(m.key(x)), heads(m.value(x)), attn_mask=bias)


def running_sum(m: Mixer, x: Tensor) -> Tensor:
    return x.cumsum(1) * 0.1


def counted_positions(m: Mixer, x: Tensor) -> Tensor:
    """Position ids that count tokens by a property of the token, as RoBERTa counts those that are no padding."""
    odd = (x[..., 0] > 0).long()
    return plain(m, x + m.position(odd.cumsum(1) * odd))


def shaped_alike(m: Mixer, x: Tensor) -> Tensor:
    """Shapes taken from another tensor, as in rotations that interleave pairs."""
    q = heads(m.query(x))
    turned = torch.stack([-q[..., 1::2], q[..., ::2]], dim=-1).reshape_as(q)
    return attend(turned, heads(m.key(x)), heads(m.value(x)), is_causal=True).view_as(x)


def positions_of_ones(m: Mixer, x: Tensor) -> Tensor:
    """Position ids as the running sum of ones that take their shape from a tensor of the tokens."""
    counted = torch.ones_like(x[..., 0], dtype=torch.int64).cumsum(-1) - 1
    return plain(m, x + m.position(counted)) + m.position(torch.full_like(counted, 2).cumsum(1).clamp(max=9))


def running_mean(m: Mixer, x: Tensor) -> Tensor:
    return x.cumsum(1) / torch.ones_like(x).cumsum(1)


def triangles_of_scores(m: Mixer, x: Tensor) -> Tensor:
    """The triangle of scores themselves, and of ones shaped like them."""
    q, k, v = heads(m.query(x)), heads(m.key(x)), heads(m.value(x))
    scores = q @ k.transpose(-1, -2)
    count = torch.ones_like(scores).tril().sum(-1, keepdim=True)
    visible = torch.ones(4, *scores.shape[-2:]).tril() + torch.ones(x.shape[0], 1, *scores.shape[-2:]).triu(1) * 0
    return ((scores.tril() * visible / count) @ v).transpose(1, 2).flatten(2)


def derive(model: nn.Module, *, tree: bool = False, raised: bool = True, **options: object) -> tuple[Program, Program]:
    forward = capture(model.eval(), max_length=LENGTH)
    raising, trees = [RaiseAttention()] if raised else [], [TreeAttention()] if tree else []
    passes = [Normalise(), *raising, DeriveStep(**options), *trees]  # type: ignore[arg-type]
    return forward, Pipeline(passes).run(forward)


@pytest.mark.parametrize(
    "mix",
    [
        plain,
        fused,
        grouped,
        matmuls,
        rank_two,
        learned_positions,
        upper_triangle,
        distances,
        running_sum,
        counted_positions,
        shaped_alike,
        positions_of_ones,
        running_mean,
        triangles_of_scores,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_step_computes_what_the_forward_does(mix: Callable[[Mixer, Tensor], Tensor], tree: bool) -> None:
    width = WIDTH // 2 if mix is grouped else WIDTH
    forward, step = derive(Mixer(mix, key_width=width), tree=tree)
    modes = check_step(forward, step)
    assert max(mode.error for mode in modes) < 1e-5
    assert len(modes) == (4 if tree else 3)


def test_only_keys_and_values_of_a_fused_projection_are_cached() -> None:
    _, step = derive(Mixer(fused))
    assert [s.shape for s in step.states] == [("B", HEADS, "S", WIDTH // HEADS)] * 2
    assert sum(s.bytes_per_token() for s in step.states) == 2 * WIDTH * 4


@pytest.mark.parametrize("raised", [True, False])
def test_grouped_heads_are_cached_before_they_are_repeated(raised: bool) -> None:
    _, step = derive(Mixer(grouped, key_width=WIDTH // 2), raised=raised)
    assert sum(s.bytes_per_token() for s in step.states) == 2 * (WIDTH // 2) * 4


def test_the_cut_follows_the_costs() -> None:
    """Two cached numbers and a projection of all past tokens, or 64 numbers read: slow memory picks the first."""
    model = Mixer(rank_two)
    _, slow_memory = derive(model, bytes_per_second=1e8, flops_per_second=1e13)
    _, slow_arithmetic = derive(model, bytes_per_second=1e13, flops_per_second=1e8)
    widths = [sorted(s.bytes_per_token() // 4 for s in step.states) for step in (slow_memory, slow_arithmetic)]
    assert widths == [[2, WIDTH], [WIDTH, 64]]


def test_step_reads_tables_at_positions_and_writes_its_states() -> None:
    _, step = derive(Mixer(learned_positions))
    targets = [str(n.target) for n in step.graph.nodes if n.op == "call_function"]
    assert targets.count("accelc.cache_update.default") == 2
    assert targets.count("accelc.attention.default") == 1
    assert "aten.arange.default" not in targets
    assert [str(n.target) for n in step.placeholders()] == [
        "tokens",
        "positions",
        "lengths",
        *(s.name for s in step.states),
    ]


def test_expected_graph_of_one_attention() -> None:
    _, step = derive(Mixer(plain))
    calls = [str(n.target).removesuffix(".default") for n in step.graph.nodes if n.op == "call_function"]
    shape = ["aten.linear", "aten.reshape", "aten.transpose.int"]
    sizes = ["aten.sym_size.int"] * 2
    cached = [*shape, "accelc.cache_update"]
    result = ["accelc.attention", "aten.transpose.int", "aten.reshape", "aten.add.Tensor", "aten.linear"]
    expected = ["aten.embedding", *sizes, *shape, *cached, *cached, *result]
    assert sorted(calls) == sorted(expected)
    order = [calls.index("accelc.cache_update"), calls.index("accelc.attention"), calls.index("aten.add.Tensor")]
    assert order == sorted(order)


# -- what is refused
# -----------------------------------------------------------------------------------------------------


def _bidirectional(m: Mixer, x: Tensor) -> Tensor:
    return attend(heads(m.query(x)), heads(m.key(x)), heads(m.value(x)))


def _length(m: Mixer, x: Tensor) -> Tensor:
    return plain(m, x) / (x.shape[1] + 2)


def _flipped(m: Mixer, x: Tensor) -> Tensor:
    return plain(m, x.flip(1))


def _shifted(m: Mixer, x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def _summed(m: Mixer, x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def _sorted(m: Mixer, x: Tensor) -> Tensor:
    return x.sort(dim=1).values


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (_length, "uses the sequence length as a number"),
        (_flipped, "reorders the sequence"),
        (_shifted, "takes a part of the sequence"),
        (_summed, "without a query|later tokens"),
        (_sorted, "sorts along the sequence"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_cannot_be_derived_is_refused_by_name(mix: Callable[[Mixer, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(DeriveError, match=reason) as caught:
        derive(Mixer(mix))
    assert "->" in caught.value.where, "the nodes around the fault are shown, the node itself marked"


def test_a_bidirectional_model_is_not_causal() -> None:
    forward, step = derive(Mixer(_bidirectional))
    with pytest.raises(NotCausalError, match="position 0"):
        check_step(forward, step)


def test_too_few_learned_positions_are_named() -> None:
    model = Mixer(learned_positions, positions=LENGTH - 1)
    with pytest.raises(AccelcError, match=f"{LENGTH - 1} learned positions|cannot trace"):
        derive(model)


# -- the check can fail ------------------------------------------------------------------------------------------------


def test_check_notices_a_window_off_by_one() -> None:
    def window(size: int) -> Callable[[Mixer, Tensor], Tensor]:
        def mix(m: Mixer, x: Tensor) -> Tensor:
            t = torch.arange(x.shape[1], device=x.device)
            seen = (t[:, None] >= t[None, :]) & (t[:, None] - t[None, :] < size)
            return attend(heads(m.query(x)), heads(m.key(x)), heads(m.value(x)), attn_mask=seen)

        return mix

    forward, _ = derive(Mixer(window(5)))
    _, wrong = derive(Mixer(window(6)))
    with pytest.raises(CheckError, match="token by token"):
        check_step(forward, wrong)


def test_check_notices_tree_nodes_that_see_each_other() -> None:
    """The negative control: a step that ignores the ancestor bits is right as a chain and wrong as a tree."""
    forward, step = derive(Mixer(plain), tree=True)
    blind = step.clone()
    for node in blind.graph.nodes:
        if node.target is torch.ops.accelc.attention.default:
            node.args = (*node.args[:5], None, *node.args[6:])
    blind.module.recompile()
    with pytest.raises(CheckError, match="run tree"):
        check_step(forward, blind)


def test_check_notices_keys_written_to_the_wrong_slot() -> None:
    forward, step = derive(Mixer(plain))
    wrong = step.clone()
    with wrong.graph.inserting_after(wrong.placeholders()[2]):
        shifted = wrong.graph.call_function(torch.ops.aten.add.Tensor, (wrong.placeholders()[2], 1))
    update = next(n for n in wrong.graph.nodes if n.target is torch.ops.accelc.cache_update.default)
    update.args = (*update.args[:2], shifted, update.args[3])
    wrong.module.recompile()
    with pytest.raises(CheckError):
        check_step(forward, wrong)


def test_check_notices_nan() -> None:
    forward, step = derive(Mixer(plain))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (step.run(*inputs)[0] * float("nan"),)

    with pytest.raises(CheckError):
        check_step(forward, step, run)


# -- half precision
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_models_that_amplify_rounding_pass_in_half_precision(name: str, dtype: torch.dtype) -> None:
    forward = capture(FAMILIES[name].build().to(dtype), max_length=LENGTH)
    modes = check_step(forward, step_pipeline().run(forward))
    assert max(mode.error for mode in modes) < 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_check_notices_a_lost_key_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """The bound that rounding raises must not hide a fault: here each layer forgets all but the last three keys."""
    forward = capture(FAMILIES[name].build().to(dtype), max_length=LENGTH)
    step = step_pipeline().run(forward).clone()
    for node in step.graph.nodes:
        if node.target is torch.ops.accelc.attention.default:
            node.args = (*node.args[:9], "window", 3, *node.args[11:])
    step.module.recompile()
    with pytest.raises(CheckError):
        check_step(forward, step)
