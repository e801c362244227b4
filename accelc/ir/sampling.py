"""From scores to a token: the processors that shape the distribution, the exact draw from it, and the operation that
does both.

Processors are pure functions on scores [B, V] with one setting per row; filtered tokens get -inf. Their meaning and
order are those of transformers' logits processors: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CANDIDATES = 1024
"""Largest scores that top-p sorts before it sorts all."""


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of tokens with seen [B, V] (bool) by penalty [B]."""
    factor = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)


def apply_temperature(scores: Tensor, temperature: Tensor) -> Tensor:
    """Divide by temperature [B]."""
    return scores / temperature[:, None]


def keep_top_k(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """Keep scores not below the k[b]-th largest (so ties with it stay); k [B] int64, none above `most`, 0 keeps all."""
    largest = scores.topk(min(most, scores.shape[-1]), dim=-1).values
    last = largest.gather(1, (k[:, None] - 1).clamp(0, largest.shape[-1] - 1))
    return scores.masked_fill((scores < last) & (k[:, None] > 0), -math.inf)


def keep_top_p(scores: Tensor, p: Tensor, candidates: int = CANDIDATES) -> Tensor:
    """Keep the likeliest tokens whose probability first reaches p [B]; 1 keeps all. Which of equal scores is open.

    Only the largest ``candidates`` scores are sorted, all of them where those do not reach p: for 32000 tokens that is
    0.07 against 8 milliseconds. Not on a GPU, which sorts fast, and where the host would have to wait to see whether
    they do.
    """
    partial = candidates < scores.shape[-1] and scores.device.type == "cpu"
    largest, order = scores.topk(candidates, dim=-1) if partial else scores.sort(dim=-1, descending=True)  # [B, C]
    probs = (largest - scores.logsumexp(dim=-1, keepdim=True)).double().exp()
    reached = probs.cumsum(dim=-1)
    limit = p[:, None]
    keep = reached - probs < limit  # what the likelier tokens reach
    if partial and bool(((reached[:, -1:] < limit) & (limit < 1)).any()):
        return keep_top_p(scores, p, scores.shape[-1])
    kept = torch.full_like(scores, -math.inf).scatter_(1, order, largest.masked_fill(~keep, -math.inf))
    return torch.where(limit < 1, kept, scores)


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least p[b] times as likely as the likeliest."""
    probs = scores.softmax(dim=-1)
    return scores.masked_fill(probs < p[:, None] * probs.amax(dim=-1, keepdim=True), -math.inf)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """One token per row from softmax(scores [B, V]), by inverting it at uniform [B] in [0, 1): int64 [B]."""
    return draw_from(scores.softmax(dim=-1), uniform)


def draw_from(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token per row from probabilities [B, V], which need not sum to 1, by inverting them at uniform [B] in [0, 1).

    Sums run in float64, so probabilities are exact to the rounding of softmax at any vocabulary size.
    """
    cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the search ends at a token with a probability.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


# -- the operation ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("accelc::draw_token", mutates_args=())
def draw_token(
    scores: Tensor, greedy: Tensor, temperature: Tensor, k: Tensor, p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """The token that decoding takes from scores [..., V]: int64 [...], -1 where they are not finite.

    The largest where greedy (bool) says so, the first of equal ones; elsewhere the one that inverts the distribution,
    which temperature (fp32), k (int64, 0 keeps all), p and min_p (fp32) shape, at uniform (fp64) in [0, 1). Settings
    are [...], or broadcast to that.
    """
    return draw_token_reference(scores, greedy, temperature, k, p, min_p, uniform)


def draw_token_reference(
    scores: Tensor, greedy: Tensor, temperature: Tensor, k: Tensor, p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """The specification of `draw_token`."""
    lead, flat = scores.shape[:-1], scores.reshape(-1, scores.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    greedy, temperature, k, p, min_p, uniform = (
        setting.expand(lead).reshape(-1) for setting in (greedy, temperature, k, p, min_p, uniform)
    )
    best = flat.argmax(-1)
    best = torch.where(flat.gather(1, best[:, None]).squeeze(1).isfinite(), best, -1)
    host = flat.device.type == "cpu"  # others do not tell without waiting what may be left out
    shaped = apply_temperature(flat, torch.where(greedy, 1.0, temperature))
    if not host or bool((k > 0).any()):
        shaped = keep_top_k(shaped, k, int(k.max()) if host else shaped.shape[-1])
    if not host or bool((p < 1).any()):
        shaped = keep_top_p(shaped, p)
    if not host or bool((min_p > 0).any()):
        shaped = keep_min_p(shaped, min_p)
    return torch.where(greedy | (best < 0), best, draw(shaped, uniform)).view(lead)


@draw_token.register_fake
def _(scores, greedy, temperature, k, p, min_p, uniform):
    return scores.new_empty(scores.shape[:-1], dtype=torch.int64)
