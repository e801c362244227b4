"""512 tokens behind prompts of real text: every family with every drafter decodes what the model alone does."""

import inspect
import json

import pytest
import torch
from families import FAMILIES, Expect, names
from greedy import parting, reference
from models import library, plain
from random_heads import heads_of

import accelc
from accelc.heads.modules import MEDUSA
from accelc.runtime.speculation.trees import RECYCLING, Tree

NEW_TOKENS = 512
PROMPTS = (48, 11, 90)
"""Characters of the prompts."""
POSITIONS = 640


def text_prompts(vocabulary: int) -> list[torch.Tensor]:
    """Beginnings of docstrings of the standard library, a token a character, none of them one of the special ones."""
    texts = (inspect.getdoc(thing) or "" for thing in (json, json.dumps, json.JSONDecoder))
    return [
        torch.tensor([3 + ord(c) % (vocabulary - 3) for c in text[:n]]) for text, n in zip(texts, PROMPTS, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", names(Expect.DERIVED))
def test_greedy_tokens_stay_over_long_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "POSITIONS", POSITIONS)
    family = FAMILIES[name]
    model = library.build(name, POSITIONS) if name in library.LIBRARY else family.build()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        if config is not None:  # min_new_tokens makes transformers suppress it
            config.eos_token_id = None
    prompts = text_prompts(family.vocabulary)
    decoder = accelc.compile(model, max_length=max(PROMPTS) + NEW_TOKENS, cache=False)
    expected = [reference(model, prompt, NEW_TOKENS) for prompt in prompts]
    drafters = (
        accelc.PromptLookup(tokens=6),
        accelc.TokenRecycling(RECYCLING.cut(20)),
        heads_of(decoder, MEDUSA, prefix=False),
        heads_of(decoder),
        accelc.DraftModel(model, tokens=3),
        accelc.DraftModel(model, tree=Tree.of_paths([(0,), (1,), (0, 0)])),
    )
    common = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    for draft in drafters:
        for rows, nodes in (((0,), None), ((0,), 7), (range(3), 7)):
            given = [prompts[row] for row in rows]
            result = decoder.generate(given, draft=draft, draft_nodes=nodes, **common)
            for row, got in zip(rows, result.tokens, strict=True):
                where = parting(model, prompts[row], expected[row], got.tolist())
                assert where is None or where.is_tie, f"{draft.name}, row {row} of {len(rows)}: {where}"
