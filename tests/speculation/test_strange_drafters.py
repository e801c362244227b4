"""Drafters of others: what they may not change, and what is said of their mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from families import FAMILIES
from torch import Tensor

import accelc
from accelc.ir.errors import DraftError
from accelc.runtime.speculation.acceptance import AcceptanceRule, Typical, register_rule
from accelc.runtime.speculation.draft import (
    Draft,
    Drafter,
    DraftKind,
    Proposer,
    Setting,
    Source,
    Text,
    register_drafter,
)
from accelc.runtime.speculation.trees import Tree

PROMPTS = [[5, 9, 2], [7, 7, 7, 7, 3]]
CHAIN = Tree.chain(3)
Propose = Callable[[Text, Setting], Any]


@dataclass(frozen=True)
class Strange(Drafter):
    """Proposes whatever a function says."""

    name: ClassVar[str] = "test.strange"
    kind: ClassVar[DraftKind] = DraftKind.DETERMINISTIC

    function: Propose

    def bind(self, setting: Setting) -> Source:
        return _Source(self.function, setting)


class _Source(Source, Proposer):
    size, depth = CHAIN.size, CHAIN.depth

    def __init__(self, function: Propose, setting: Setting) -> None:
        self.function, self.setting = function, setting

    def start(self, *_: Any) -> Proposer:
        return self

    def propose(self, text: Text, nodes: int) -> Draft:
        return self.function(text, self.setting)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def decoder() -> accelc.CompiledDecoder:
    return accelc.compile(FAMILIES["llama"].build(), max_length=128, cache=False)


def chain(tokens: Callable[[Text], Tensor]) -> Strange:
    return Strange(lambda text, setting: Draft(tokens(text), CHAIN.layout()))


def decoded(decoder: accelc.CompiledDecoder, draft: Drafter | None) -> list[list[int]]:
    given = {"max_new_tokens": 30, "ignore_eos": True} | ({} if draft is None else {"draft": draft, "draft_nodes": 4})
    return [row.tolist() for row in decoder.generate(PROMPTS, **given).tokens]


@pytest.mark.parametrize(
    "tokens",
    [
        lambda text: (text.root.expand(-1, 4) + 1) % 97,
        lambda text: torch.full((2, 4), 9999),
        lambda text: torch.full((2, 4), 97),
        lambda text: torch.full((2, 4), -5),
        lambda text: torch.full((2, 4), -1),
    ],
    ids=["another root", "no token", "one too many", "negative", "what says that logits are not finite"],
)
def test_no_proposal_changes_what_is_decoded(decoder: accelc.CompiledDecoder, tokens: Callable[[Text], Tensor]) -> None:
    assert decoded(decoder, chain(tokens)) == decoded(decoder, None)


def failing(*_: Any) -> Draft:
    raise ZeroDivisionError("in a drafter")


def drawn(text: Text, _: Setting) -> Draft:
    return Draft(text.root.expand(-1, 4).contiguous(), CHAIN.layout(), DraftKind.INDEPENDENT)


MISTAKES: dict[str, tuple[Drafter, str]] = {
    "too many columns": (chain(lambda text: text.root.expand(-1, 7).contiguous()), "tokens \\[2, 7\\]"),
    "one row": (chain(lambda text: torch.zeros(1, 4, dtype=torch.int64)), "for 2 rows"),
    "floats": (chain(lambda text: torch.zeros(2, 4)), "float32"),
    "one dim": (chain(lambda text: torch.zeros(4, dtype=torch.int64)), "tokens \\[4\\]"),
    "nothing": (Strange(lambda text, _: None), "NoneType"),
    "a tensor": (Strange(lambda text, _: text.root), "Tensor"),
    "an error": (Strange(failing), "ZeroDivisionError: in a drafter"),
    "drawn drafts": (Strange(drawn), "independent drafts, and its kind is deterministic"),
    "a larger tree": (
        Strange(lambda text, _: Draft(text.root.expand(-1, 9).contiguous(), Tree.chain(8).layout())),
        "9 nodes and depth 8, where its source says 4 and 3",
    ),
    "probabilities": (
        Strange(
            lambda text, _: Draft(
                text.root.expand(-1, 4).contiguous(), CHAIN.layout(), probabilities=torch.ones(2, 4, 97)
            )
        ),
        "deterministic drafts with probabilities",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_drafter(decoder: accelc.CompiledDecoder, mistake: str) -> None:
    draft, said = MISTAKES[mistake]
    with pytest.raises(DraftError, match=said) as error:
        decoded(decoder, draft)
    assert "test.strange" in str(error.value)
    assert decoded(decoder, None)  # the decoder goes on


def test_a_class_is_no_drafter(decoder: accelc.CompiledDecoder) -> None:
    with pytest.raises(DraftError, match="PromptLookup is a class"):
        decoder.generate([[5]], max_new_tokens=4, draft=accelc.PromptLookup)  # type: ignore[arg-type]
    with pytest.raises(DraftError, match="Typical is a class"):
        decoder.generate([[5]], max_new_tokens=4, draft="prompt_lookup", accept=Typical)  # type: ignore[arg-type]


def test_a_second_model_has_as_many_candidates_as_tokens(decoder: accelc.CompiledDecoder) -> None:
    wide = accelc.DraftModel(FAMILIES["llama"].build(), tree=Tree.of_paths([(100,)]))
    with pytest.raises(DraftError, match="101 candidates"):
        decoder.generate([[5]], max_new_tokens=4, draft=wide)


# -- what statistics count, and seeds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [None, 6])
@pytest.mark.parametrize("many", [1, 2, 23])
def test_tokens_of_steps_are_those_that_were_taken(
    decoder: accelc.CompiledDecoder, many: int, nodes: int | None
) -> None:
    """But the first of each row, which comes from its prompt."""
    draft = accelc.DraftModel(FAMILIES["llama"].build(), tokens=5)  # always right
    result = decoder.generate(PROMPTS, max_new_tokens=many, ignore_eos=True, draft=draft, draft_nodes=nodes)
    found = result.statistics.speculation
    assert found is not None
    assert result.statistics.new_tokens == len(PROMPTS) + found.tokens
    assert found.tokens == sum(n * count for n, count in enumerate(found.lengths))
    assert "nan" not in str(result.statistics)


def test_tokens_of_a_row_that_is_stopped(decoder: accelc.CompiledDecoder) -> None:
    plain = decoder.generate([[5, 9, 2]], max_new_tokens=20, ignore_eos=True).tokens[0].tolist()
    draft = accelc.DraftModel(FAMILIES["llama"].build(), tokens=9)
    result = decoder.generate([[5, 9, 2]], max_new_tokens=20, ignore_eos=True, draft=draft, draft_nodes=10,
                              stop_tokens=plain[4])  # fmt: skip
    found = result.statistics.speculation
    assert found is not None
    assert result.statistics.new_tokens == 1 + found.tokens == plain.index(plain[4]) + 1


@pytest.mark.parametrize("accept", ["rejection", "typical"])
def test_a_seed_gives_the_same_tokens_whatever_steps_cost(decoder: accelc.CompiledDecoder, accept: str) -> None:
    draft = accelc.DraftModel(FAMILIES["llama"].build(), tokens=4)
    given = {"max_new_tokens": 60, "ignore_eos": True, "draft": draft, "accept": accept, "seed": 1}
    sampling = accelc.SamplingParams(temperature=1.0)
    found = {
        tuple(decoder.generate([[5, 9, 2]], sampling=sampling, **given).tokens[0].tolist())  # type: ignore[arg-type]
        for _ in range(4)
    }
    assert len(found) == 1


def test_a_lossy_rule_is_labelled(decoder: accelc.CompiledDecoder) -> None:
    given = {"max_new_tokens": 8, "draft": "prompt_lookup", "sampling": accelc.SamplingParams(temperature=1.0)}
    assert "(LOSSY)" in str(decoder.generate([[5, 9]], accept="typical", **given).statistics)  # type: ignore[arg-type]
    assert "LOSSY" not in str(decoder.generate([[5, 9]], **given).statistics)  # type: ignore[arg-type]


def test_classes_that_say_too_little_are_refused_where_they_are_registered() -> None:
    class Kindless(Drafter):
        name = "test.kindless"

    class Nameless(Drafter):
        kind = DraftKind.DETERMINISTIC

    class Bare(AcceptanceRule):
        pass

    with pytest.raises(DraftError, match=r"Kindless has no kind[\s\S]*attributes: name, kind"):
        register_drafter(Kindless)
    with pytest.raises(DraftError, match="Nameless has no name"):
        register_drafter(Nameless)
    with pytest.raises(DraftError, match="Bare has no name and no exactness"):
        register_rule(Bare)
    with pytest.raises(DraftError, match="no drafter is named"):
        accelc.runtime.speculation.draft.DRAFTERS.find("test.kindless")
