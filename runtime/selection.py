"""Selectors: turn logits [B, V] into one token per row. A row whose logits are not finite gets -1.

Finite means: no NaN, no +inf, and not all -inf (a model may mask single tokens with -inf).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from accelc.ir.errors import SamplingError
from accelc.runtime.functions import Functions, put
from accelc.runtime.sampling import SamplingParams
from accelc.runtime.shaping import Shaping, Uniforms

HALVES = (torch.bfloat16, torch.float16)
"""What numpy's maximum is slow for, or does not know."""

Selector = Callable[[Tensor], list[int]]
"""logits [B, V] -> one token a row, -1 where its logits are not finite."""


def selector(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    prompts: Sequence[Tensor],
    like: Tensor,
    call: Functions | None = None,
    most: int = 0,
) -> Selector:
    """The cheapest selector that does what ``params`` ask for, one per row, for logits like ``like`` [B, V]. ``call``:
    what calls tensor functions; ``most``: tokens that a row may be asked for.
    """
    if all(p == SamplingParams() for p in params):
        return greedy_selector(like.device)
    sampler = Sampler(params, seeds, prompts, like, call, most)
    return lambda logits: sampler(logits).tolist()


def greedy_selector(device: torch.device) -> Selector:
    """Takes the likeliest token of each row, from logits on a device."""
    return LikeliestOnHost() if device.type == "cpu" else lambda logits: likeliest(logits).tolist()


def likeliest(logits: Tensor) -> Tensor:
    """The token with the largest logit, the lowest id on a tie."""
    if logits.device.type != "cpu":
        values, tokens = logits.max(dim=-1)
        return torch.where(values.isfinite(), tokens, -1)
    return torch.tensor(likeliest_on_host(logits))


def likeliest_on_host(logits: Tensor) -> list[int]:
    """`likeliest` of logits on a CPU, as numbers."""
    # numpy's argmax is vectorised, torch's is not: 3 against 28 microseconds for 32000 floats on a Zen 5 core.
    scores = (logits.float() if logits.dtype in HALVES else logits).numpy()
    best = scores.argmax(axis=-1)  # the first NaN if there is one
    peaks = scores[np.arange(len(best)), best]
    return [token if finite else -1 for token, finite in zip(best.tolist(), np.isfinite(peaks).tolist(), strict=True)]


class LikeliestOnHost:
    """`likeliest_on_host` of tensors that may be one and the same each time, written anew."""

    def __init__(self) -> None:
        self._logits: Tensor | None = None
        self._row: np.ndarray | None = None
        """Its memory, where it holds one row that numpy can read."""

    def __call__(self, logits: Tensor) -> list[int]:
        if logits is not self._logits:
            self._logits = logits
            readable = len(logits) == 1 and logits.dtype not in HALVES
            self._row = logits[0].numpy() if readable else None
        if self._row is None:
            return likeliest_on_host(logits)
        token = int(self._row.argmax())  # the first NaN if there is one
        return [token if math.isfinite(self._row.item(token)) else -1]


class Sampler:
    """Per-row sampling. Row b's draws depend on seeds[b], its own logits and its own settings, not on its neighbours.

    A greedy row among sampled ones takes its likeliest token; the repetition penalty covers prompt and output.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        prompts: Sequence[Tensor],
        like: Tensor,
        call: Functions | None = None,
        most: int = 0,
    ) -> None:
        self._shaping = Shaping(params, like.device)
        self._settings = self._shaping.settings
        self._uniforms = Uniforms(seeds, like.device, most + 1)
        self._seen = tokens_seen(prompts, like)
        self._call = call or Functions()
        self._drawn, self._index = 0, torch.zeros(len(params), dtype=torch.int64, device=like.device)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row [B] from its logits [B, V]; the next call may overwrite it."""
        uniforms = self._uniforms.reach(self._drawn + 1)
        self._drawn += 1
        if not self._shaping.penalizes:
            (tokens,) = self._call(draw_next, logits, self._index, uniforms, *self._settings)
            return tokens
        scores = self._shaping.scores(logits, self._seen)
        tokens = torch.ops.accelc.draw_token(scores, *self._settings, uniforms[:, self._drawn - 1])
        self._seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
        return tokens


def draw_following(logits: Tensor, new: Tensor, uniforms: Tensor, *settings: Tensor) -> tuple[Tensor]:
    """What decoding takes next from logits [B, V]: int64 [B], with random numbers [B, M] by index, of which new [B] are
    used up, and settings [B].
    """
    uniform = uniforms.gather(1, new[:, None]).squeeze(1)
    return (torch.ops.accelc.draw_token(logits, *settings, uniform),)


def draw_next(logits: Tensor, new: Tensor, uniforms: Tensor, *settings: Tensor) -> tuple[Tensor]:
    """`draw_following`, and new goes on by one."""
    tokens = draw_following(logits, new, uniforms, *settings)
    put(new[:, None], new[:, None] + 1)
    return tokens


def tokens_seen(prompts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Which tokens the prompts hold, of those that logits like `like` [B, V] score: bool [B, V]."""
    seen = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt[prompt < like.shape[-1]].to(like.device)] = True
    return seen


def spread_params(sampling: SamplingParams | Sequence[SamplingParams] | None, batch: int) -> list[SamplingParams]:
    """One set of parameters per row, from one for all, one each, or None for greedy."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * batch
    params = list(sampling) if isinstance(sampling, Iterable) else []
    if not isinstance(sampling, Iterable) or not all(isinstance(p, SamplingParams) for p in params):
        raise SamplingError(
            f"sampling is {sampling!r}", remedy="Give an accelc.SamplingParams(temperature=...), or one per row."
        )
    if len(params) != batch:
        raise SamplingError(
            f"{len(params)} sampling settings for {batch} rows", remedy="Give one SamplingParams, or one per row."
        )
    return params


def spread_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed per row: row r of one seed uses seed + r; None takes one from torch's own generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, Integral) and not isinstance(seed, bool):
        seeds: list[object] = [int(seed) + row for row in range(batch)]
    else:
        seeds = list(seed) if isinstance(seed, Iterable) else [seed]
    valid = [isinstance(s, Integral) and not isinstance(s, bool) and 0 <= int(s) < 2**63 for s in seeds]
    if len(seeds) != batch or not all(valid):
        raise SamplingError(
            f"seed is {seed!r}", remedy=f"Give an integer in [0, 2**63), or one for each of {batch} rows."
        )
    return [int(s) for s in seeds]  # type: ignore[call-overload]
