"""Every family decodes, greedily, the tokens that transformers (or its own forward) does: batch 1 and a ragged batch
of 3, plainly and with drafts; and its steps over trees give the logits of each path.
"""

import pytest
import torch
from draft_trees import check_trees
from families import FAMILIES, Expect, names
from greedy import parting, reference
from random_heads import heads_of

import accelc
from accelc.ir.errors import AccelcError, NoLogitsError
from accelc.runtime.speculation.prompt_lookup import PromptLookup
from accelc.runtime.speculation.token_recycling import TokenRecycling
from accelc.runtime.speculation.trees import RECYCLING

NEW_TOKENS = 128
WITH_HEADS = ("llama", "gpt2", "deepseek_v3", "gemma3", "einsum_attention")
"""Families that draft by heads here; the others do in a slow test."""
DRAFTS = (PromptLookup(tokens=6), TokenRecycling(RECYCLING.cut(20)))
PROMPTS = (13, 5, 29)
"""Prompt lengths of the ragged batch, longer than the models' windows."""


def _prompts(vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names(Expect.DERIVED) if name not in WITH_HEADS])
def test_greedy_tokens_stay_with_heads(name: str) -> None:
    family = FAMILIES[name]
    prompts = _prompts(family.vocabulary)
    decoder = accelc.compile(family.build(), max_length=max(PROMPTS) + NEW_TOKENS, cache=False)
    plain = decoder.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    draft = heads_of(decoder)
    for given, rows in ((prompts, range(3)), (prompts[0], range(1))):
        fast = decoder.generate(given, max_new_tokens=NEW_TOKENS, ignore_eos=True, draft=draft, draft_nodes=7)
        for row, got in zip(rows, fast.tokens, strict=True):
            where = parting(family.build(), prompts[row], plain.tokens[row].tolist(), got.tolist())
            assert where is None or where.is_tie, f"row {row}: {where}"


@pytest.mark.parametrize("name", names(Expect.DERIVED))
def test_greedy_tokens_equal_the_model(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    prompts = _prompts(family.vocabulary)
    decoder = accelc.compile(model, max_length=max(PROMPTS) + NEW_TOKENS, check="full", cache=False)
    # min_new_tokens makes transformers suppress its end-of-sequence token; without one, both simply go on.
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        if config is not None:
            config.eos_token_id = None
    expected = [reference(model, prompt, NEW_TOKENS) for prompt in prompts]
    alone = decoder.generate(prompts[0], max_new_tokens=NEW_TOKENS, ignore_eos=True)
    together = decoder.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    pairs = [(0, alone.tokens[0].tolist()), *enumerate(t.tolist() for t in together.tokens)]
    fast = decoder.generate(prompts[0], max_new_tokens=NEW_TOKENS, ignore_eos=True, draft=DRAFTS[1], draft_nodes=20)
    pairs.append((0, fast.tokens[0].tolist()))
    for draft in (*DRAFTS, heads_of(decoder)) if name in WITH_HEADS else DRAFTS:
        fast = decoder.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True, draft=draft, draft_nodes=20)
        pairs += enumerate(t.tolist() for t in fast.tokens)
    for row, got in pairs:
        where = parting(model, prompts[row], expected[row], got)
        assert where is None or where.is_tie, f"row {row}: {where}"
        if where is not None:
            print(f"{name} row {row}: {where}")
    check_trees(model, decoder, family.vocabulary)


@pytest.mark.parametrize("name", names(Expect.REFUSED))
def test_what_has_no_step_is_refused_with_place_and_reason(name: str) -> None:
    with pytest.raises(AccelcError) as caught:
        accelc.compile(FAMILIES[name].build(), max_length=64, cache=False)
    assert caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize("name", names(Expect.DERIVED_OR_REFUSED))
def test_other_mixers_are_right_or_refused(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    try:
        decoder = accelc.compile(model, max_length=64, check="full", cache=False)
    except AccelcError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.where, "a refusal names its place"
        return
    prompt = _prompts(family.vocabulary)[0]
    got = decoder.generate(prompt, max_new_tokens=24, ignore_eos=True).tokens[0].tolist()
    where = parting(model, prompt, reference(model, prompt, 24), got)
    assert where is None or where.is_tie, str(where)


def test_no_logits_is_named() -> None:
    with pytest.raises(NoLogitsError, match="without logits"):
        accelc.compile(FAMILIES["no_logits"].build(), max_length=64, cache=False)
