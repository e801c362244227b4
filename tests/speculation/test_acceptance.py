"""Acceptance rules by brute force against the exact distribution: a quarter of a million draws a rule and kind of
draft, a million in `make test-slow`.
"""

import pytest
import torch
from torch import Tensor

from accelc.ir import Exactness
from accelc.ir.errors import DraftError
from accelc.ir.sampling import draw_from
from accelc.runtime import SamplingParams
from accelc.runtime.shaping import Shaping
from accelc.runtime.speculation.acceptance import RULES, AcceptanceRule, Matching, Rejection, Typical, rule_for
from accelc.runtime.speculation.draft import NOTHING, Accepted, Draft, DraftKind
from accelc.runtime.speculation.target import Target, TargetSampler
from accelc.runtime.speculation.trees import Tree

VOCABULARY = 5
TREE = Tree.of_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0)])
ROWS = 125_000
"""Draws of a round."""


class Fresh:
    """Random numbers for many rows at once, in place of one generator a row."""

    def __init__(self, rows: int, generator: torch.Generator) -> None:
        self.rows, self.generator = rows, generator
        self.known = torch.empty(rows, 0, dtype=torch.float64)

    def reach(self, count: int) -> Tensor:
        more = count - self.known.shape[1]
        if more > 0:
            block = torch.rand(self.rows, more, dtype=torch.float64, generator=self.generator)
            self.known = torch.cat([self.known, block], dim=1)
        return self.known


def sampler(rows: int, generator: torch.Generator, params: SamplingParams | None = None) -> TargetSampler:
    shaping = Shaping([params or SamplingParams(temperature=1.0)], torch.device("cpu")).spread(rows)
    seen = torch.zeros(rows, VOCABULARY, dtype=torch.bool) if shaping.penalizes else None
    uniforms = Fresh(rows, generator), Fresh(rows, generator)
    return TargetSampler(shaping, *uniforms, seen, ahead=TREE.depth)  # type: ignore[arg-type]


def table(seed: int, sharp: float) -> Tensor:
    """Scores [V, V] of the next token by the last one."""
    return (
        torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharp
    )


TARGET = table(0, 1.3)
PROPOSAL = (table(0, 1.3) + table(1, 0.9)).softmax(-1)


def drafts(kind: DraftKind, rows: int, generator: torch.Generator, tree: Tree = TREE) -> Draft:
    """Trees below token 0, each child by what the kind says, from PROPOSAL of its parent."""
    tokens = torch.zeros(rows, tree.size, dtype=torch.int64)
    for node in range(tree.size):
        children = [c for c in range(1, tree.size) if tree.parents[c] == node]
        left = PROPOSAL[tokens[:, node]].clone()
        for child in children:
            if kind is DraftKind.DETERMINISTIC:
                tokens[:, child] = left.argsort(-1, descending=True)[:, tree.ranks[child]]
                continue
            tokens[:, child] = draw_from(left, torch.rand(rows, dtype=torch.float64, generator=generator))
            if kind is DraftKind.WITHOUT_REPLACEMENT:
                left.scatter_(1, tokens[:, child : child + 1], 0.0)
    q = None if kind is DraftKind.DETERMINISTIC else PROPOSAL[tokens]
    return Draft(tokens, tree.layout(), kind, q)


def accepted(rule: AcceptanceRule, draft: Draft, state: TargetSampler) -> Accepted:
    logits = TARGET[draft.tokens.clamp(min=0)]
    return rule.accept(Target(state, draft, logits, torch.ones_like(draft.tokens[:, 0])))


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Pearson's statistic and its 1 - 1e-6 quantile (Wilson and Hilferty's approximation)."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * counts.sum()
    statistic = float(((counts[probabilities > 0] - expected) ** 2 / expected).sum())
    freedom = max(int((probabilities > 0).sum()) - 1, 1)
    return statistic, freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


def law(
    rule: AcceptanceRule, kind: DraftKind, params: SamplingParams | None = None, rounds: int = 1
) -> tuple[Tensor, Tensor, float]:
    """How often each first token came [V]; each second token by the first, where the first was a draft [V, V]; and the
    mean number of tokens.
    """
    generator = torch.Generator().manual_seed(3)
    first = torch.zeros(VOCABULARY, dtype=torch.float64)
    second = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    total = 0
    for _ in range(rounds):
        state = sampler(ROWS, generator, params)
        got = accepted(rule, drafts(kind, ROWS, generator), state)
        first += torch.bincount(got.tokens[:, 0], minlength=VOCABULARY)
        more = got.counts > 1
        pairs = got.tokens[more, 0] * VOCABULARY + got.tokens[more, 1]
        second += torch.bincount(pairs, minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY)
        total += int(got.counts.sum())
    return first, second, total / (ROWS * rounds)


@pytest.mark.parametrize("kind", list(DraftKind), ids=str)
@pytest.mark.parametrize("rule", [Matching(), Rejection()], ids=lambda r: r.name)
@pytest.mark.parametrize("rounds", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_lossless_rules_draw_from_the_target(rule: AcceptanceRule, kind: DraftKind, rounds: int) -> None:
    first, second, _ = law(rule, kind, rounds=rounds)
    exact = TARGET.softmax(-1)
    statistic, limit = chi_square(first, exact[0])
    assert statistic < limit
    for token in range(VOCABULARY):
        if second[token].sum() > 1000:
            statistic, limit = chi_square(second[token], exact[token])
            assert statistic < limit, token


def test_filters_shape_what_rejection_draws_from() -> None:
    first, _, _ = law(Rejection(), DraftKind.WITHOUT_REPLACEMENT, SamplingParams(temperature=0.7, top_k=3))
    exact = (TARGET[0] / 0.7).masked_fill(TARGET[0] < TARGET[0].topk(3).values.min(), -torch.inf).softmax(-1)
    statistic, limit = chi_square(first, exact)
    assert statistic < limit


def test_the_test_sees_a_draft_that_is_scored_wrongly() -> None:
    """The negative control: tokens picked by score, accepted as if they had been drawn."""

    def mislabelled(rows: int, generator: torch.Generator) -> Draft:
        draft = drafts(DraftKind.DETERMINISTIC, rows, generator)
        return Draft(draft.tokens, draft.layout, DraftKind.INDEPENDENT, PROPOSAL[draft.tokens])

    generator = torch.Generator().manual_seed(3)
    got = accepted(Rejection(), mislabelled(ROWS, generator), sampler(ROWS, generator))
    statistic, limit = chi_square(
        torch.bincount(got.tokens[:, 0], minlength=VOCABULARY).double(), TARGET[0].softmax(-1)
    )
    assert statistic > 10 * limit


def test_typical_acceptance_is_not_the_target() -> None:
    first, _, _ = law(Typical(), DraftKind.DETERMINISTIC)
    statistic, limit = chi_square(first, TARGET[0].softmax(-1))
    assert statistic > limit
    assert Typical.exactness is Exactness.LOSSY


def test_rejection_keeps_more_of_what_was_drawn_than_matching() -> None:
    for kind in (DraftKind.INDEPENDENT, DraftKind.WITHOUT_REPLACEMENT):
        assert law(Rejection(), kind)[2] > law(Matching(), kind)[2] + 0.05
    # A deterministic draft is kept as often by both: with the target's probability of it.
    same = [law(rule, DraftKind.DETERMINISTIC)[2] for rule in (Rejection(), Matching())]
    assert same[0] == pytest.approx(same[1], abs=0.01)


def test_greedy_rows_keep_the_likeliest_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    best = [0]
    for _ in range(4):
        best.append(int(TARGET[best[-1]].argmax()))
    for kind in DraftKind:
        draft = drafts(kind, 500, generator)
        for rule in (Matching(), Rejection()):
            got = accepted(rule, draft, sampler(500, generator, SamplingParams()))
            for row in range(500):
                count = int(got.counts[row])
                assert got.tokens[row, :count].tolist() == best[1 : count + 1]
            assert got.counts.max() > 1


def test_nodes_without_tokens_and_without_logits() -> None:
    tree = Tree.of_paths([(0,), (1,), (0, 0)])
    best = int(TARGET[0].argmax())
    draft = Draft(torch.tensor([[0, NOTHING, best, 0], [0, best, NOTHING, NOTHING]]), tree.layout())
    logits = TARGET[draft.tokens.clamp(min=0)].clone()
    logits[1, 1] = torch.nan
    for rule in (Matching(), Rejection(), Typical()):
        state = sampler(2, torch.Generator().manual_seed(0), SamplingParams())
        got = rule.accept(Target(state, draft, logits, torch.ones_like(draft.tokens[:, 0])))
        assert got.counts.tolist() == [2, 2]
        assert got.node.tolist() == [2, 1]
        assert got.tokens[0, :2].tolist() == [best, int(TARGET[best].argmax())]
        assert got.tokens[1, :2].tolist() == [best, -1]  # the logits behind it are no numbers


def test_typical_acceptance_takes_the_longest_path_then_the_likeliest() -> None:
    tree = Tree.of_paths([(0,), (1,), (2,), (1, 0), (2, 0)])
    logits = torch.zeros(1, tree.size, VOCABULARY, dtype=torch.float64)  # all tokens alike: typical
    logits[0, 2, 4] = 1.0
    draft = Draft(torch.tensor([[0, 1, 2, 3, 4, 4]]), tree.layout())
    state = sampler(1, torch.Generator().manual_seed(0), SamplingParams(temperature=1.0))
    got = Typical().accept(Target(state, draft, logits, torch.ones_like(draft.tokens[:, 0])))
    assert (got.node.tolist(), got.counts.tolist()) == ([4], [3])
    assert got.path[0].tolist() == [0, 2, 4]


def test_rules_by_name() -> None:
    assert set(RULES.names()) >= {"matching", "rejection", "typical"}
    assert rule_for(DraftKind.DETERMINISTIC) == Matching()
    assert rule_for(DraftKind.INDEPENDENT) == rule_for(DraftKind.INDEPENDENT, "rejection") == Rejection()
    with pytest.raises(DraftError, match="no acceptance rule is named 'reject'") as caught:
        rule_for(DraftKind.INDEPENDENT, "reject")
    assert "Did you mean 'rejection'?" in caught.value.remedy
    for wrong in ({"epsilon": 0}, {"delta": 1.5}, {"epsilon": "x"}, {"delta": True}):
        with pytest.raises(DraftError, match=next(iter(wrong))):
            Typical(**wrong)  # type: ignore[arg-type]

    class Wishful(Matching):
        """Keeps its promise for drawn siblings alone."""

        name = "tests.wishful"
        kinds = frozenset({DraftKind.INDEPENDENT})

    with pytest.raises(DraftError, match="not made for deterministic drafts"):
        rule_for(DraftKind.DETERMINISTIC, Wishful())
