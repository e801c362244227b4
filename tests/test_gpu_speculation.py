"""Speculation on a CUDA device: the same tokens, and steps that the host does not wait in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, Expect, names
from random_heads import heads_of
from test_gpu import prompts, worst_choice

import accelc
from accelc.heads.modules import MEDUSA
from accelc.runtime.speculation.generation import SpeculativeGeneration
from accelc.runtime.speculation.trees import RECYCLING, Tree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NEW_TOKENS = 40
MAX_LENGTH = 96
SMALL = Tree.of_paths([(0,), (1,), (0, 0)])

DRAFTERS: dict[str, Callable[[accelc.CompiledDecoder, torch.nn.Module], Any]] = {
    "prompt_lookup": lambda decoder, model: accelc.PromptLookup(tokens=5),
    "token_recycling": lambda decoder, model: accelc.TokenRecycling(RECYCLING.cut(12)),
    "medusa": lambda decoder, model: heads_of(decoder, MEDUSA, prefix=False),
    "hydra": lambda decoder, model: heads_of(decoder, prefix=False),
    "hydra with a prefix layer": lambda decoder, model: heads_of(decoder),
    "second model": lambda decoder, model: accelc.DraftModel(model, tokens=3),
    "second model, tree": lambda decoder, model: accelc.DraftModel(model, tree=SMALL),
}
SAMPLING = {
    "greedy": accelc.SamplingParams(),
    "sampled": accelc.SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
}


@contextmanager
def nothing_may_wait() -> Iterator[None]:
    """An operation that makes the host wait raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", names(Expect.DERIVED))
def test_greedy_tokens_are_the_choices_of_the_model(name: str) -> None:
    """Every family, with the drafters that know nothing of the model and with heads."""
    family = FAMILIES[name]
    model = family.build().cuda()
    given = prompts(family.vocabulary)
    decoder = accelc.compile(model, max_length=MAX_LENGTH, cache=False)
    for drafter in ("token_recycling", "hydra with a prefix layer"):
        draft = DRAFTERS[drafter](decoder, model)
        result = decoder.generate(given, max_new_tokens=NEW_TOKENS, ignore_eos=True, draft=draft, draft_nodes=7)
        for prompt, tokens in zip(given, result.tokens, strict=True):
            assert len(tokens) == NEW_TOKENS
            assert worst_choice(model, prompt, tokens.cpu()) <= 1e-3


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_steps_do_not_wait(drafter: str, sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft, verify, accept, commit and learn, for three rows that keep different numbers of tokens."""
    model = FAMILIES["llama"].build().cuda()
    decoder = accelc.compile(model, max_length=MAX_LENGTH, cache=False)
    common = {
        "max_new_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "draft": DRAFTERS[drafter](decoder, model),
        "draft_nodes": 6,
        "sampling": SAMPLING[sampling],
        "seed": 3,
    }
    expected = decoder.generate(prompts(97), **common)  # traces functions, which may wait
    speculate, steps = SpeculativeGeneration._speculate, 0

    def watched(self: SpeculativeGeneration, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 1:  # what a generation builds for itself
            return speculate(self, *args)
        with nothing_may_wait():
            return speculate(self, *args)

    monkeypatch.setattr(SpeculativeGeneration, "_speculate", watched)
    result = decoder.generate(prompts(97), **common)
    assert steps > 3
    assert [row.tolist() for row in result.tokens] == [row.tolist() for row in expected.tokens]
    assert result.statistics.speculation is not None
    assert min(result.statistics.speculation.seconds.values()) > 0
