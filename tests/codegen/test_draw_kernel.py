"""The kernel that draws tokens against its specification."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from accelc.functions import compile_function
from accelc.ir.sampling import apply_temperature, draw_token_reference, keep_min_p, keep_top_k, keep_top_p

ROWS = 512
INF = math.inf
Settings = dict[str, float]

CASES: dict[str, Settings] = {
    "greedy": {"greedy": 1},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top 1": {"k": 1},
    "top 7": {"k": 7},
    "top 300": {"k": 300},
    "top of more than there are": {"k": 10**6},
    "nucleus": {"p": 0.7},
    "a nucleus of nearly all": {"p": 0.9999},
    "a nucleus of one": {"p": 1e-6},
    "min_p": {"min_p": 0.1},
    "everything": {"temperature": 0.8, "k": 50, "p": 0.9, "min_p": 0.02},
}


def settings_of(rows: int, greedy: float = 0, temperature: float = 1, k: float = 0, p: float = 1, min_p: float = 0):
    return (
        torch.full((rows,), bool(greedy)),
        torch.full((rows,), float(temperature)),
        torch.full((rows,), int(k)),
        torch.full((rows,), float(p)),
        torch.full((rows,), float(min_p)),
    )


def drawn(*inputs: Tensor) -> tuple[Tensor]:
    return (torch.ops.accelc.draw_token(*inputs),)


def kernel(*inputs: Tensor) -> Tensor:
    function = compile_function(drawn, inputs)
    assert not function.report.eager  # type: ignore[attr-defined]
    return function(*inputs)[0].clone()


def distance(scores: Tensor, uniform: Tensor, tokens: Tensor, settings: Settings) -> Tensor:
    """How far each random number [B] lies from the interval of the cumulative distribution that its token stands for,
    by the processors in fp64 over what they leave of scores [B, V] in fp32.
    """
    shaped = apply_temperature(scores.float(), torch.tensor([settings.get("temperature", 1.0)]))
    if k := int(settings.get("k", 0)):
        shaped = keep_top_k(shaped, torch.full((len(shaped),), k), k)
    if (p := settings.get("p", 1.0)) < 1:
        shaped = keep_top_p(shaped, torch.full((len(shaped),), p))
    if least := settings.get("min_p", 0.0):
        shaped = keep_min_p(shaped, torch.full((len(shaped),), least))
    whole = shaped.double().softmax(-1).cumsum(-1)
    high = whole.gather(1, tokens[:, None]).squeeze(1)
    low = high - shaped.double().softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    return torch.maximum(low - uniform, uniform - high).clamp(min=0)


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 97, 2048, 32003])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_specification(case: str, vocabulary: int) -> None:
    """But where a random number falls on an edge between two tokens, by rounding."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = ROWS if vocabulary < 10000 else 24
    scores = 3 * torch.randn(rows, vocabulary, generator=generator)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    settings = settings_of(rows, **CASES[case])
    got, want = kernel(scores, *settings, uniform), draw_token_reference(scores, *settings, uniform)
    if case == "greedy":
        assert torch.equal(got, want)
        return
    # A token at the cut of a nucleus may be in or out, by rounding of the sum: some 1e-6 of the mass.
    assert distance(scores, uniform, got, CASES[case]).max() < 2e-6
    assert (got == want).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype: torch.dtype) -> None:
    scores = (3 * torch.randn(ROWS, 300)).to(dtype)
    uniform = torch.rand(ROWS, dtype=torch.float64)
    settings = settings_of(ROWS, temperature=0.8, k=40)
    got = kernel(scores, *settings, uniform)
    assert distance(scores, uniform, got, {"temperature": 0.8, "k": 40}).max() < 2e-6


def test_scores_that_are_not_finite() -> None:
    scores = torch.zeros(6, 40)
    scores[0, 7], scores[1, 3], scores[2] = math.nan, INF, -INF
    scores[3, :39], scores[4, 1:] = -INF, -INF
    for greedy in (0, 1):
        settings = settings_of(6, greedy=greedy)
        got = kernel(scores, *settings, torch.full((6,), 0.5, dtype=torch.float64))
        assert got[:5].tolist() == [-1, -1, -1, 39, 0]
        assert got[5] == (0 if greedy else 20)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_ends_of_the_distribution_have_a_probability(uniform: float) -> None:
    """Tokens that were filtered out lie on both sides."""
    scores = torch.full((1, 1000), -5.0)
    scores[0, 400:600] = torch.linspace(0, 1, 200)
    got = kernel(scores, *settings_of(1, k=200), torch.tensor([uniform], dtype=torch.float64))
    assert 400 <= int(got) < 600
    assert int(got) == {0.0: 400, 1.0 - 2.0**-53: 599}.get(uniform, int(got))


def test_rows_have_their_own_settings() -> None:
    """Settings that are broadcast over the nodes of trees, as speculation gives them."""
    scores = torch.randn(3, 5, 700)
    uniform = torch.rand(3, 5, dtype=torch.float64)
    each = settings_of(1, greedy=1), settings_of(1, k=3), settings_of(1, p=0.5, temperature=2.0)
    settings = [torch.cat(parts)[:, None] for parts in zip(*each, strict=True)]
    got = kernel(scores, *settings, uniform)
    assert got.shape == (3, 5)
    assert torch.equal(got, draw_token_reference(scores, *settings, uniform))


@pytest.mark.parametrize("case", ["plain", "nucleus", "everything"])
def test_tokens_come_as_often_as_they_should(case: str) -> None:
    """A million draws of one distribution."""
    scores = 1.5 * torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    many = 1_000_000
    settings = settings_of(many, **CASES[case])
    uniform = torch.rand(many, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(kernel(scores.repeat(many, 1), *settings, uniform), minlength=200).double()
    shaped = partial(torch.full, (1,))
    wanted = apply_temperature(scores, shaped(float(CASES[case].get("temperature", 1.0))))
    if k := int(CASES[case].get("k", 0)):
        wanted = keep_top_k(wanted, shaped(k), k)
    if (p := CASES[case].get("p", 1.0)) < 1:
        wanted = keep_top_p(wanted, shaped(p))
    wanted = keep_min_p(wanted, shaped(CASES[case].get("min_p", 0.0))).double().softmax(-1)[0]
    assert counts[wanted == 0].sum() == 0
    expected = wanted[wanted > 0] * many
    statistic = float(((counts[wanted > 0] - expected) ** 2 / expected).sum())
    freedom = max(len(expected) - 1, 1)
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)
