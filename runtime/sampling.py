"""Sampling: what a user may ask for, the processors that shape the distribution, and the exact draw from it.

Processors are pure functions on scores [B, V] with one setting per row; filtered tokens get -inf. Their meaning and
order are those of transformers' logits processors: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from torch import Tensor

from accelc.ir.errors import SamplingError, unknown_options

CANDIDATES = 1024
"""Largest scores that top-p sorts before it sorts all."""


@dataclass(frozen=True)
class SamplingParams:
    """How one row picks its next token. The default is greedy: the likeliest token, the lowest id on a tie.

    * ``temperature``: 0 is greedy; otherwise scores are divided by it.
    * ``top_k``: keep the k likeliest tokens (and ties with the last of them); 0 keeps all.
    * ``top_p``: keep the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020).
    * ``min_p``: drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024).
    * ``repetition_penalty``: positive scores of tokens in prompt or output are divided by it, negative ones multiplied
      (Keskar et al. 2019); acts on greedy rows too.

    Raises `UnknownOptionError`, and `SamplingError` for values out of range and for filters that greedy decoding would
    ignore.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __new__(cls, *values: float, **options: float) -> SamplingParams:
        known = [f.name for f in fields(cls)]
        if unknown := options.keys() - set(known):
            raise unknown_options("SamplingParams", unknown, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, Real, _is_temperature, "0 (greedy) or a number >= 1e-6")
        _require("top_k", self.top_k, Integral, lambda k: k >= 0, "an integer >= 0 (0 keeps all tokens)")
        _require("top_p", self.top_p, Real, lambda p: 0 < p <= 1, "in (0, 1]")
        _require("min_p", self.min_p, Real, lambda p: 0 <= p < 1, "in [0, 1)")
        _require("repetition_penalty", self.repetition_penalty, Real, lambda p: 0 < p < math.inf, "a number > 0")
        filters = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        if self.greedy and any(filters.values()):
            names = ", ".join(name for name, given in filters.items() if given)
            raise SamplingError(
                f"{names} has no effect on greedy decoding",
                remedy="Set a temperature above 0 (1.0 leaves scores alone).",
            )

    @property
    def greedy(self) -> bool:
        """Whether the row takes the likeliest token and draws nothing."""
        return self.temperature == 0


def _is_temperature(value: float) -> bool:
    return value == 0 or 1e-6 <= value < math.inf  # smaller ones overflow the scores


def _require(name: str, value: object, kind: type, accept, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not accept(value):
        raise SamplingError(f"{name} is {value!r}", remedy=f"{name} must be {wanted}.")


# -- processors: scores [B, V] float, one setting per row [B] ----------------------------------------------------------


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
