"""Sampling: processors against transformers', draws against brute-force distributions, rows apart from their batch."""

import math

import pytest
import torch
from tiny_decoder import VOCAB, prompts_of
from transformers.generation import logits_process as hf

from accelc.ir.errors import SamplingError
from accelc.ir.sampling import (
    apply_temperature,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from accelc.runtime import Decoder, SamplingParams
from accelc.runtime.selection import LikeliestOnHost, Sampler, likeliest

SCORES = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3


def every(value, dtype=torch.float32):
    return torch.full((len(SCORES),), value, dtype=dtype)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda s: apply_temperature(s, every(0.7)), hf.TemperatureLogitsWarper(0.7)),
        (lambda s: keep_top_k(s, every(5, torch.int64), 5), hf.TopKLogitsWarper(5)),
        (lambda s: keep_top_k(s, every(500, torch.int64), 500), hf.TopKLogitsWarper(500)),
        (lambda s: keep_top_p(s, every(0.8)), hf.TopPLogitsWarper(0.8)),
        (lambda s: keep_top_p(s, every(0.01)), hf.TopPLogitsWarper(0.01)),
        (lambda s: keep_min_p(s, every(0.1)), hf.MinPLogitsWarper(0.1)),
    ],
)
def test_filters_equal_those_of_transformers(ours, theirs):
    tied = SCORES.clone()
    tied[1, :10] = tied[1].max()
    for scores in (SCORES, tied):
        # Which of equal scores stays is open in both, so compare what stays, not where.
        torch.testing.assert_close(ours(scores).sort(-1).values, theirs(None, scores).sort(-1).values)
    torch.testing.assert_close(ours(SCORES), theirs(None, SCORES))


def test_the_repetition_penalty_equals_that_of_transformers():
    ids = torch.tensor([[1, 2, 2, 7]] * len(SCORES))
    seen = torch.zeros_like(SCORES, dtype=torch.bool).scatter_(1, ids, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(ids, SCORES.clone())
    torch.testing.assert_close(penalize_repetition(SCORES, seen, every(1.3)), expected)


def test_each_row_has_its_own_settings():
    k = torch.tensor([1, 3, 0, 50])
    assert keep_top_k(SCORES, k, 50).isfinite().sum(-1).tolist() == [1, 3, 50, 50]
    p = torch.tensor([1e-6, 0.5, 1.0, 0.9])
    alone = [keep_top_p(SCORES[i : i + 1], p[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(keep_top_p(SCORES, p), torch.cat(alone))
    assert keep_top_p(SCORES, p).isfinite().sum(-1)[2] == 50


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_top_p_sorts_more_than_its_candidates_when_they_do_not_reach_p(scale):
    scores = torch.randn(3, 5000) * scale
    p = torch.tensor([0.3, 0.95, 1.0])
    for candidates in (1, 64, 5000):
        ours = keep_top_p(scores, p, candidates)
        for row in range(3):
            expected = hf.TopPLogitsWarper(p[row].item())(None, scores[row : row + 1].double())
            # Sums of 5000 float32 probabilities may differ by a token at the cut.
            assert abs(int(ours[row].isfinite().sum()) - int(expected.isfinite().sum())) <= 1
            kept = ours[row].isfinite()
            assert kept.all() or ours[row][kept].min() >= scores[row][~kept].max()


def reference_distribution(row, params, seen):
    """Float64, one token at a time, written from the definitions."""
    scores = row.double().tolist()
    for token in seen:
        scores[token] = (
            scores[token] * params.repetition_penalty
            if scores[token] < 0
            else scores[token] / params.repetition_penalty
        )
    scores = {t: s / params.temperature for t, s in enumerate(scores)}

    def probs():
        top = max(scores.values())
        weights = {t: math.exp(s - top) for t, s in scores.items()}
        return {t: w / sum(weights.values()) for t, w in weights.items()}

    if params.top_k:
        limit = sorted(scores.values(), reverse=True)[min(params.top_k, len(scores)) - 1]
        scores = {t: s for t, s in scores.items() if s >= limit}
    if params.top_p < 1:
        kept, mass = {}, 0.0
        for token, p in sorted(probs().items(), key=lambda item: -item[1]):
            if mass >= params.top_p:
                break
            kept[token] = scores[token]
            mass += p
        scores = kept
    if params.min_p:
        p = probs()
        scores = {t: s for t, s in scores.items() if p[t] >= params.min_p * max(p.values())}
    dense = torch.zeros(len(row), dtype=torch.float64)
    for token, p in probs().items():
        dense[token] = p
    return dense


def chi_square(counts, probs):
    """Pearson's statistic and its 1 - 1e-6 quantile (Wilson and Hilferty's approximation)."""
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * counts.sum()
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum().item()
    freedom = max(int((probs > 0).sum()) - 1, 1)
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic, quantile


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.0, min_p=0.05),
        SamplingParams(temperature=1.2, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    ],
    ids=str,
)
def test_the_sampler_draws_from_exactly_the_asked_distribution(params):
    """200 rows x 1000 steps = 200k draws of one distribution, through seeds, filters and the draw itself."""
    rows, steps = 200, 1000
    logits = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 1.5
    prompt = torch.tensor([0, 3, 5, 5])
    batch = logits.expand(rows, -1)
    sampler = Sampler([params] * rows, range(rows), [prompt] * rows, batch)
    seen = sampler._seen.clone()
    counts = torch.zeros(20, dtype=torch.float64)
    for _ in range(steps):
        sampler._seen.copy_(seen)  # hold the penalty still, so that all draws share one distribution
        counts += torch.bincount(sampler(batch), minlength=20)
    probs = reference_distribution(logits, params, {0, 3, 5})
    statistic, quantile = chi_square(counts, probs)
    assert statistic < quantile
    # The test can fail: the same counts do not fit a slightly different temperature.
    wrong = reference_distribution(logits, SamplingParams(temperature=params.temperature * 1.1), ())
    wrong = torch.where(probs > 0, wrong, 0)
    statistic, quantile = chi_square(counts, wrong / wrong.sum())
    assert statistic > quantile


def test_a_large_vocabulary_is_drawn_exactly():
    """float32 sums over 200k equal tokens would favour some; the draw inverts at the very edges too."""
    size = 200_000
    scores = torch.zeros(1, size)
    uniform = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    tokens = torch.cat([draw(scores, u[None]) for u in uniform])
    assert (tokens - uniform * size).abs().max() <= 1
    scores = torch.full((1, 8), -math.inf)
    scores[0, [2, 5]] = 0.0
    edges = torch.tensor([0.0, 0.5 - 2**-54, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert [int(draw(scores, u[None])) for u in edges] == [2, 2, 5, 5]


def test_a_row_draws_the_same_in_any_batch(tiny):
    prompts = prompts_of([3, 7, 5])
    params = [SamplingParams(1.0), SamplingParams(0.8, top_k=9, repetition_penalty=1.2), SamplingParams(1.3, top_p=0.9)]
    decoder = tiny.decoder()
    together = decoder.generate(prompts, max_new_tokens=30, sampling=params, seed=[11, 12, 13])
    for row in range(3):
        alone = decoder.generate(prompts[row], max_new_tokens=30, sampling=params[row], seed=11 + row)
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
    reversed_ = decoder.generate(prompts[::-1], max_new_tokens=30, sampling=params[::-1], seed=[13, 12, 11])
    assert [t.tolist() for t in reversed_.tokens[::-1]] == [t.tolist() for t in together.tokens]


def test_seeds_reproduce_and_differ(tiny):
    decoder = tiny.decoder()
    prompt = prompts_of([4])[0]
    hot = SamplingParams(temperature=2.0)
    first = decoder.generate([prompt] * 3, max_new_tokens=20, sampling=hot, seed=5)
    assert first.seeds == [5, 6, 7]
    assert len({tuple(t.tolist()) for t in first.tokens}) == 3
    drawn = decoder.generate([prompt] * 3, max_new_tokens=20, sampling=hot)
    again = decoder.generate([prompt] * 3, max_new_tokens=20, sampling=hot, seed=drawn.seeds)
    assert [t.tolist() for t in again.tokens] == [t.tolist() for t in drawn.tokens]
    torch.manual_seed(1)
    one = decoder.generate(prompt, max_new_tokens=20, sampling=hot)
    torch.manual_seed(1)
    assert decoder.generate(prompt, max_new_tokens=20, sampling=hot).seeds == one.seeds


def test_greedy_rows_among_sampled_ones(tiny):
    prompts = prompts_of([4, 6])
    result = tiny.decoder().generate(
        prompts, max_new_tokens=15, sampling=[SamplingParams(), SamplingParams(temperature=1.5)], seed=0
    )
    assert result.tokens[0].tolist() == tiny.greedy(prompts[0], 15)
    assert result.tokens[1].tolist() != tiny.greedy(prompts[1], 15)


def test_a_greedy_repetition_penalty_sees_prompt_and_output(tiny):
    prompt = prompts_of([6])[0]
    result = tiny.decoder().generate(prompt, max_new_tokens=20, sampling=SamplingParams(repetition_penalty=1.5))
    ids = list(prompt)
    processor = hf.RepetitionPenaltyLogitsProcessor(1.5)
    for _ in range(20):
        scores = processor(torch.tensor([ids]), tiny.forward(torch.tensor(ids))[-1:].clone())
        ids.append(int(scores.argmax()))
    assert result.sequences[0].tolist() == ids
    assert ids[6:] != tiny.greedy(prompt, 20)


def test_the_whole_path_draws_from_the_model_distribution():
    """First tokens of 100 000 rows of a constant model: prefill, sampler and seeds together."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(9))
    rows = 20_000
    decoder = Decoder(
        lambda tokens, *_: (logits.expand(tokens.shape[0], 1, VOCAB),), None, [], max_length=8, vocab_size=VOCAB
    )
    result = decoder.generate([[1]] * rows, max_new_tokens=5, sampling=SamplingParams(temperature=0.9), seed=77)
    counts = torch.bincount(torch.cat(result.tokens), minlength=VOCAB).double()
    assert counts.sum() == 100_000
    statistic, quantile = chi_square(counts, torch.softmax(logits.double() / 0.9, -1))
    assert statistic < quantile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_greedy_selector_reads_memory_that_is_written_anew(rows, dtype):
    select, logits = LikeliestOnHost(), torch.zeros(rows, 7, dtype=dtype)
    for turn, other in enumerate((False, False, True, False)):
        given = torch.zeros_like(logits) if other else logits
        given.zero_()[:, turn + 1] = 2.0
        given[-1, turn + 2] = 3.0
        assert select(given) == [turn + 1] * (rows - 1) + [turn + 2]
    logits[-1] = math.nan
    assert select(logits) == [4] * (rows - 1) + [-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_are_not_finite_are_marked(bad, dtype):
    logits = torch.randn(3, 5000).to(dtype)
    logits[1, 4321] = bad
    logits[2] = -math.inf
    logits[0, :100] = -math.inf
    expected = [int(logits[0].float().argmax()), -1, -1]
    assert likeliest(logits).tolist() == expected
    sampler = Sampler([SamplingParams(temperature=1.0)] * 3, range(3), [torch.tensor([1])] * 3, logits)
    tokens = sampler(logits).tolist()
    assert tokens[0] >= 100
    assert tokens[1:] == [-1, -1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_k": 2.5},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(SamplingError):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": [SamplingParams()]},
        {"sampling": ["greedy", "greedy"]},
        {"seed": -1},
        {"seed": [1]},
        {"seed": True},
        {"seed": [1, 2.0]},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_batch(tiny, options):
    with pytest.raises(SamplingError):
        tiny.decoder().generate([[1], [2]], max_new_tokens=2, **options)
