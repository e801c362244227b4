"""The target's side of a verified tree: the scores of every node, shaped as plain decoding would shape them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from accelc.runtime.functions import Functions, increase
from accelc.runtime.sampling import SamplingParams
from accelc.runtime.selection import draw_following, tokens_seen
from accelc.runtime.shaping import Shaping, Uniforms
from accelc.runtime.speculation.draft import Draft

OWN_STREAM = 0x5DEECE66D
"""Sets the random numbers that acceptance takes beyond plain decoding's apart from those."""


class TargetSampler:
    """What the choice of a token depends on besides its logits, over a generation: settings, seeds, tokens seen.

    The n-th new token of a row is drawn by the row's n-th random number, whatever else the batch and the trees do:
    where acceptance follows what the target draws, a seed gives the tokens that it gives without speculation.
    """

    def __init__(
        self,
        shaping: Shaping,
        uniforms: Uniforms,
        own: Uniforms,
        seen: Tensor | None,
        call: Functions | None = None,
        ahead: int = 0,
    ) -> None:
        """ahead: most tokens of a path behind the root."""
        self.shaping = shaping
        self.call = call or Functions()
        self._uniforms, self._own, self._ahead = uniforms, own, ahead
        self._owned = 0
        self.plain_greedy = not (shaping.samples or shaping.penalizes)
        """Whether every row takes the largest of its logits as they are."""
        self.times_seen = None if seen is None else seen.int()
        """[B, V] int32, where a repetition penalty needs it."""
        self.new = torch.zeros(len(shaping.greedy), dtype=torch.int64, device=shaping.greedy.device)
        """[B]: tokens chosen so far, where any are drawn."""
        self._taken = [0] * len(self.new)
        """The same on the host."""
        self._settings = shaping.settings

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        prompts: Sequence[Tensor],
        like: Tensor,
        call: Functions | None = None,
        *,
        most: int = 0,
        ahead: int = 0,
    ) -> TargetSampler:
        """For logits like ``like`` [B, V] behind prompts, `most` tokens of a row and paths of `ahead` drafts."""
        shaping = Shaping(params, like.device)
        own = Uniforms([(seed ^ OWN_STREAM) % 2**63 for seed in seeds], like.device)
        seen = tokens_seen(prompts, like) if shaping.penalizes else None
        return cls(shaping, Uniforms(seeds, like.device, most + 2 * ahead + 2), own, seen, call, ahead)

    @property
    def draws(self) -> tuple[Tensor, ...] | None:
        """What `draw_at` takes besides logits and depths, the same tensors each time; None where the choice depends on
        the tokens before.
        """
        if self.times_seen is not None:
            return None
        return self.new, self.uniforms_ahead, *self._settings

    @property
    def uniforms_ahead(self) -> Tensor:
        """Plain decoding's random numbers [B, M] by index; known as far as the next paths may go."""
        return self._uniforms.reach(max(self._taken) + self._ahead + 1)

    def following(self, logits: Tensor) -> Tensor:
        """The token that plain decoding takes next in each row, [B], from its logits [B, V]; the next call may
        overwrite it.
        """
        if self.draws is not None:
            return self.call(draw_following, logits, *self.draws)[0]
        assert self.times_seen is not None
        scores = self.shaping.scores(logits, self.times_seen > 0)
        return draw_following(scores, self.new, self.uniforms_ahead, *self._settings)[0]

    def count(self, tokens: Tensor, counts: Tensor, taken: Sequence[int]) -> None:
        """The first counts[b] of tokens [B, K] were taken; ``taken``: counts on the host."""
        if self.plain_greedy:
            return
        if self.times_seen is not None:
            kept = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
            self.times_seen.scatter_add_(1, tokens.clamp(min=0), kept.int())
        self.call(increase, self.new, counts)
        self._taken = [have + more for have, more in zip(self._taken, taken, strict=True)]
        _ = self.uniforms_ahead  # so that they are known: steps that are repeated do not ask for them

    def own_uniforms(self, count: int) -> Tensor:
        """Random numbers [B, count] that plain decoding does not use, each once."""
        begin = self._owned
        self._owned += count
        return self._own.reach(self._owned)[:, begin : self._owned]


def draw_at(logits: Tensor, depths: Tensor, new: Tensor, uniforms: Tensor, *settings: Tensor) -> tuple[Tensor]:
    """What plain decoding takes behind nodes at depths [B or 1, N] from logits [B, N, V]: int64 [B, N], with random
    numbers [B, M] by index, of which new [B] are used up, and settings [B].
    """
    index = new[:, None] + depths
    uniform = uniforms.gather(1, index)
    return (torch.ops.accelc.draw_token(logits, *[setting[:, None] for setting in settings], uniform),)


class Target:
    """The target at the nodes of a draft, for an acceptance rule to ask; what it does not ask is not computed."""

    def __init__(self, sampler: TargetSampler, draft: Draft, logits: Tensor, active: Tensor) -> None:
        self._sampler, self.draft = sampler, draft
        self.active = active
        """[B] int64: 1 for rows that generate, 0 for those that have ended."""
        self.logits = logits
        """[B, N, V]."""
        self.call = sampler.call
        """Calls tensor functions."""
        self.plain_greedy = sampler.plain_greedy

    @cached_property
    def _shaping(self) -> Shaping:
        """Of each node, for scores [B * N, V]."""
        return self._sampler.shaping.spread(self.logits.shape[1])

    @cached_property
    def _scores(self) -> Tensor:
        """[B * N, V]."""
        flat = self.logits.flatten(0, 1)
        times_seen = self._sampler.times_seen
        if times_seen is None:
            return self._shaping.scores(flat, None)
        b, n, _ = self.logits.shape
        layout = self.draft.layout
        node = torch.arange(n, device=flat.device)[:, None]
        depth = torch.arange(layout.paths.shape[-1], device=flat.device)
        above = torch.where(depth <= layout.depths[..., None], layout.paths, node).expand(b, -1, -1)  # [B, N, D + 1]
        tokens = self.draft.tokens.clamp(min=0).gather(1, above.flatten(1)).view_as(above)
        seen = (times_seen > 0)[:, None].repeat(1, n, 1).scatter_(2, tokens, True)
        return self._shaping.scores(flat, seen.flatten(0, 1))

    @property
    def draws(self) -> tuple[Tensor, ...] | None:
        """`TargetSampler.draws`."""
        return self._sampler.draws

    @cached_property
    def chosen(self) -> Tensor:
        """[B, N] int64: what plain decoding would take behind each node; -1 where the logits are not finite."""
        sampler, depths = self._sampler, self.draft.layout.depths
        if sampler.draws is not None:
            return self.call(draw_at, self.logits, depths, *sampler.draws)[0]
        scores = self._scores.view(self.logits.shape)
        return draw_at(scores, depths, sampler.new, sampler.uniforms_ahead, *sampler.shaping.settings)[0]

    @cached_property
    def finite(self) -> Tensor:
        """[B, N] bool: whether the logits of a node are numbers."""
        return self.logits.amax(-1).isfinite()

    @cached_property
    def probabilities(self) -> Tensor:
        """[B, N, V]: what plain decoding draws from behind each node; one token has all in greedy rows."""
        return self._shaping.probabilities(self._scores).view(self.logits.shape)

    def uniforms(self, count: int) -> Tensor:
        """Random numbers [B, count] for the rule's own use."""
        return self._sampler.own_uniforms(count)
