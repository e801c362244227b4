"""A second model drafts: the same model drafts perfectly, another one keeps the tokens, a wrong vocabulary is named."""

import pytest
import torch
from families import FAMILIES
from torch import nn

import accelc
from accelc.ir.errors import DraftError
from accelc.runtime import SamplingParams
from accelc.runtime.speculation.trees import Tree

PROMPTS = [[5, 9, 11, 4, 5, 9], [7], [3, 4, 3, 4, 3, 4, 3, 4, 8]]
SMALL = Tree.of_paths([(0,), (1,), (0, 0), (0, 1), (0, 0, 0), (1, 0)])
WARM = SamplingParams(temperature=0.9, top_p=0.95)


def jittered(amount: float) -> nn.Module:
    """The model with other weights by a little: what a distilled draft model is to its teacher."""
    model = FAMILIES["llama"].build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * parameter.std() * amount
    return model


@pytest.fixture(scope="module")
def target() -> accelc.CompiledDecoder:
    return accelc.compile(FAMILIES["llama"].build(), max_length=96, cache=False)


@pytest.fixture(scope="module")
def near() -> accelc.CompiledDecoder:
    return accelc.compile(jittered(0.05), max_length=96, cache=False)


@pytest.mark.parametrize("options", [{"tokens": 4}, {"tree": Tree.chain(4)}], ids=["drawn", "tree"])
@pytest.mark.parametrize("sampling", [None, WARM], ids=["greedy", "sampled"])
def test_the_model_itself_drafts_what_it_says(
    target: accelc.CompiledDecoder, options: dict, sampling: SamplingParams | None
) -> None:
    """Greedy drafts are all kept; drawn ones too, since p equals q; a greedy chain is not what sampling draws."""
    draft = accelc.DraftModel(FAMILIES["llama"].build(), **options)
    result = target.generate(
        PROMPTS, max_new_tokens=41, ignore_eos=True, draft=draft, draft_nodes=5, sampling=sampling, seed=1
    )
    found = result.statistics.speculation
    assert found is not None
    if sampling is None or "tokens" in options:
        assert found.mean_accepted_length == 5.0
        assert result.statistics.steps == 8
    if sampling is None:
        plain = target.generate(PROMPTS, max_new_tokens=41, ignore_eos=True)
        assert [t.tolist() for t in result.tokens] == [t.tolist() for t in plain.tokens]


@pytest.mark.parametrize("tree", [None, SMALL], ids=["chain", "tree"])
@pytest.mark.parametrize("nodes", [None, 3, 100])
def test_greedy_tokens_stay(
    target: accelc.CompiledDecoder, near: accelc.CompiledDecoder, tree: Tree | None, nodes: int | None
) -> None:
    plain = target.generate(PROMPTS, ignore_eos=True)  # to the longest sequence
    draft = accelc.DraftModel(near, tokens=5, tree=tree)
    fast = target.generate(PROMPTS, ignore_eos=True, draft=draft, draft_nodes=nodes)
    assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]
    found = fast.statistics.speculation
    assert found is not None
    if nodes == 100:
        assert found.mean_accepted_length > 1.5


def test_it_catches_up_after_tokens_without_drafts(target: accelc.CompiledDecoder) -> None:
    """Drafts of the model itself are kept whenever they are made, though it was left out for many tokens."""
    draft = accelc.DraftModel(FAMILIES["llama"].build(), tokens=4)
    for pause in (1, 2, 5, 40):
        many = 1 + 5 + pause + 8 * 5  # whole steps
        stream = target.stream(PROMPTS, max_new_tokens=many, ignore_eos=True, draft=draft, draft_nodes=5)
        generation = stream._generation
        inner, sizes = generation._draft, iter([5, *[1] * pause])  # type: ignore[attr-defined]
        generation._draft = lambda proposer, text, _, inner=inner, sizes=sizes: inner(proposer, text, next(sizes, 5))  # type: ignore[attr-defined]
        list(stream)
        found = stream.result.statistics.speculation
        assert found is not None
        assert (found.lengths[1], sum(found.lengths[2:5])) == (3 * pause, 0)
        assert found.lengths[5] > 3


def test_matched_samples_stay(target: accelc.CompiledDecoder, near: accelc.CompiledDecoder) -> None:
    options = {"max_new_tokens": 40, "ignore_eos": True, "sampling": WARM, "seed": 3}
    plain = target.generate(PROMPTS, **options)  # type: ignore[arg-type]
    fast = target.generate(PROMPTS, draft=accelc.DraftModel(near), accept="matching", **options)  # type: ignore[arg-type]
    assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]


def test_rejection_keeps_more_drawn_drafts(target: accelc.CompiledDecoder, near: accelc.CompiledDecoder) -> None:
    draft, lengths = accelc.DraftModel(near, tokens=4), {}
    for rule in ("matching", "rejection"):
        found = [
            target.generate(PROMPTS, max_new_tokens=60, ignore_eos=True, draft=draft, draft_nodes=5, accept=rule,
                            sampling=SamplingParams(temperature=1.0), seed=seed).statistics.speculation
            for seed in range(6)
        ]  # fmt: skip
        lengths[rule] = sum(f.tokens for f in found if f) / sum(f.row_steps for f in found if f)
    assert lengths["rejection"] > lengths["matching"] + 0.1


def test_mixed_rows(target: accelc.CompiledDecoder, near: accelc.CompiledDecoder) -> None:
    """A greedy row beside sampled ones, under rejection: its tokens are the greedy ones."""
    params = [SamplingParams(), WARM, WARM]
    plain = target.generate(PROMPTS, max_new_tokens=30, ignore_eos=True)
    fast = target.generate(
        PROMPTS, max_new_tokens=30, ignore_eos=True, sampling=params, seed=1, draft=accelc.DraftModel(near)
    )
    assert fast.tokens[0].tolist() == plain.tokens[0].tolist()


def test_another_architecture_and_few_bits(target: accelc.CompiledDecoder) -> None:
    plain = target.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    for name, quantize in (("gpt2", None), ("llama", "int4")):
        draft = accelc.DraftModel(FAMILIES[name].build(), quantize=quantize)
        fast = target.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, draft=draft)
        assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]


class Bigram(nn.Module):
    """A model of a vocabulary of its own."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_mistakes_are_named(target: accelc.CompiledDecoder, near: accelc.CompiledDecoder) -> None:
    with pytest.raises(DraftError, match="scores 11 tokens"):
        target.generate(PROMPTS, draft=accelc.DraftModel(Bigram(11)))
    with pytest.raises(DraftError, match="scores 11 tokens"):  # before the first call
        accelc.compile(FAMILIES["llama"].build(), max_length=96, cache=False, draft=accelc.DraftModel(Bigram(11)))
    short = accelc.compile(jittered(0.0), max_length=32, cache=False)
    with pytest.raises(DraftError, match="holds 32 tokens"):
        target.generate(PROMPTS, draft=accelc.DraftModel(short))
    for wrong in ({"model": 3}, {"model": near, "tokens": 0}, {"model": near, "tree": "x"}):
        with pytest.raises(DraftError):
            accelc.DraftModel(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DraftError, match="no defaults"):
        target.generate(PROMPTS, draft="draft_model")


def test_sessions_are_closed(target: accelc.CompiledDecoder, near: accelc.CompiledDecoder) -> None:
    stream = target.stream(PROMPTS, max_new_tokens=20, draft=accelc.DraftModel(near))
    for _ in range(5):
        next(stream)
    session = stream._generation._proposer.session  # type: ignore[attr-defined]
    stream.close()
    assert session._space is None
