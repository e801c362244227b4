"""The test models are what they claim: deterministic, causal or not, with logits that depend on attention."""

import pytest
import torch
from families import FAMILIES, Expect, Family, names

BATCH, LENGTH, CHANGED = 2, 21, 11
TOLERANCE = 1e-4


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def _ids(family: Family, batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, family.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _changes(family: Family) -> tuple[float, float, float]:
    """Largest logit, and how much changing one token changes the logits before it and from it on."""
    model, ids = family.build(), _ids(family)
    full = _logits(model, ids)
    changed = ids.clone()
    changed[0, CHANGED] = 3 if ids[0, CHANGED] != 3 else 4
    difference = (_logits(model, changed) - full).abs().amax(-1)[0]
    return full.abs().max().item(), difference[:CHANGED].max().item(), difference[CHANGED + 1 :].max().item()


@pytest.mark.parametrize("name", names(Expect.DERIVED, Expect.DERIVED_OR_REFUSED))
def test_model_is_causal_and_mixes_tokens(name: str) -> None:
    largest, before, after = _changes(FAMILIES[name])
    assert before <= TOLERANCE * largest
    assert after > 0.02 * largest, "a token should matter to those after it, or a lost cache entry would not show"


def test_bidirectional_model_is_not_causal() -> None:
    largest, before, _ = _changes(FAMILIES["bidirectional"])
    assert before > 0.02 * largest


def test_length_as_number_changes_with_the_length() -> None:
    family = FAMILIES["length_as_number"]
    model, ids = family.build(), _ids(family)
    assert not torch.allclose(_logits(model, ids)[:, :9], _logits(model, ids[:, :9]), rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "nano_gpt"])
def test_build_repeats_its_weights(name: str) -> None:
    family = FAMILIES[name]
    first, second = family.build().state_dict(), family.build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", names(Expect.DERIVED))
def test_greedy_tokens_vary(name: str) -> None:
    """A model that repeats one token would agree with almost any wrong decoder."""
    family = FAMILIES[name]
    model, ids = family.build(), _ids(family, batch=1, length=7)
    for _ in range(32):
        ids = torch.cat([ids, _logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert len(set(ids[0, 7:].tolist())) >= 4
