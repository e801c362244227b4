"""From logits to the distribution that a user asked for, and the random numbers that draw from it, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelc.ir.sampling import (
    CANDIDATES,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from accelc.runtime.sampling import SamplingParams

DRAWS = 64
"""Random numbers fetched from a row's generator at once; part of what a seed means, so never change it."""


class Shaping:
    """What `SamplingParams`, one for each row of scores [R, V], do to them. Greedy rows keep their scores."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

        self.greedy = torch.tensor([p.greedy for p in params], device=device)
        """[R] bool."""
        self._temperature = torch.where(self.greedy, 1.0, column("temperature"))
        self._k, self._p, self._min = column("top_k", torch.int64), column("top_p"), column("min_p")
        self._penalty = column("repetition_penalty")
        # Of a row cut to its k best, the k best reach any p.
        self._candidates = max((min(p.top_k or CANDIDATES, CANDIDATES) for p in params if p.top_p < 1), default=1)
        self.samples = any(not p.greedy for p in params)
        self.penalizes = any(p.repetition_penalty != 1 for p in params)
        self._most_k = max((p.top_k for p in params), default=0)
        self._cuts_p = any(p.top_p < 1 for p in params)
        self._cuts_min = any(p.min_p > 0 for p in params)

    @property
    def settings(self) -> tuple[Tensor, ...]:
        """Those of `accelc::draw_token` before the random number, [R] each."""
        return self.greedy, self._temperature, self._k, self._p, self._min

    def spread(self, times: int) -> Shaping:
        """For scores [R * times, V] whose neighbours belong to one row."""
        wider = object.__new__(Shaping)
        wider.__dict__.update(self.__dict__)
        for name in ("greedy", "_temperature", "_k", "_p", "_min", "_penalty"):
            setattr(wider, name, getattr(self, name).repeat_interleave(times))
        return wider

    def scores(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits [R, V] in fp32 or wider, with the repetition penalty for tokens with seen [R, V] (bool)."""
        scores = logits if logits.dtype == torch.float64 else logits.float()
        return scores if seen is None else penalize_repetition(scores, seen, self._penalty)

    def filter(self, scores: Tensor) -> Tensor:
        """Temperature and filters; what is filtered out is -inf."""
        scores = apply_temperature(scores, self._temperature)
        if self._most_k:
            scores = keep_top_k(scores, self._k, self._most_k)
        if self._cuts_p:
            scores = keep_top_p(scores, self._p, self._candidates)
        return keep_min_p(scores, self._min) if self._cuts_min else scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """What is drawn from [R, V]; one token has all in greedy rows."""
        best = scores.argmax(-1, keepdim=True)
        certain = torch.zeros_like(scores).scatter_(1, best, 1.0)
        if not self.samples:
            return certain
        return torch.where(self.greedy[:, None], certain, self.filter(scores).softmax(-1))


class Uniforms:
    """Random numbers in [0, 1) of each row by index: row b's depend on its seed alone."""

    def __init__(self, seeds: Sequence[int], device: torch.device, room: int = DRAWS) -> None:
        """room: numbers of a row that there is memory for from the start; `reach` then gives the same tensor so far."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._known = 0
        # Of few lengths: functions are compiled for each.
        room = max(DRAWS, 1 << (room - 1).bit_length())
        self._table = torch.zeros(len(self._generators), room, dtype=torch.float64, device=device)

    def reach(self, count: int) -> Tensor:
        """A tensor whose first `count` columns are the first numbers of each row: [B, >= count] float64."""
        while self._known < count:
            block = torch.stack([torch.rand(DRAWS, dtype=torch.float64, generator=g) for g in self._generators])
            if self._table.device.type == "cuda":  # from pinned memory, so that the host need not wait
                block = block.pin_memory()
            if self._known == self._table.shape[1]:
                self._table = torch.cat([self._table, torch.zeros_like(self._table)], dim=1)
            self._table[:, self._known : self._known + DRAWS].copy_(block, non_blocking=True)
            self._known += DRAWS
        return self._table
