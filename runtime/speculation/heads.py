"""Drafts of networks on a model's last hidden states: the runtime part of `accelc.Medusa` and `accelc.Hydra`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir import StateSpec
from accelc.runtime.session import TappedChunk
from accelc.runtime.speculation.acceptance import at_node
from accelc.runtime.speculation.draft import Accepted, Draft, Proposer, Source, Text
from accelc.runtime.speculation.target import TargetSampler
from accelc.runtime.speculation.trees import Layout
from accelc.runtime.steps import StepFunction


@dataclass(frozen=True)
class Drafting:
    """A program that drafts trees of one size.

    run(hidden [B, N, H], last [B], root [B, 1]) -> (tokens [B, M], ...): from row last[b] of the hidden states of each
    row's last tokens. With a context, run(hidden, positions [B, N], lengths [B], last, root, *states).
    """

    run: StepFunction
    layout: Layout | None
    """None where run returns the tensors of a `Layout` behind the tokens."""
    width: int


@dataclass(frozen=True)
class Context:
    """What heads read where it depends on all tokens so far: a step of hidden states with caches of its own.

    run(hidden [B, N, H], positions [B, N], lengths [B], *states) -> (hidden [B, N, H],).
    """

    run: StepFunction
    states: tuple[StateSpec, ...]
    capacity: int
    max_length: int


class HeadDrafts(Source):
    """Trees of at most `size` nodes; drafting(nodes): what drafts those of so many, made when it is first asked for."""

    def __init__(
        self,
        drafting: Callable[[int], Drafting],
        passes: tuple[object, ...],
        *,
        size: int,
        depth: int,
        context: Context | None,
    ) -> None:
        self.drafting, self.passes, self.context = drafting, passes, context
        self.size, self.depth = size, depth

    def start(self, text: Text, sampler: TargetSampler, prompts: Sequence[TappedChunk]) -> Proposer:
        proposer = _FromLast(self) if self.context is None else _FromContext(self, self.context, text)
        for chunk in prompts:
            proposer.read(chunk.taps[0], chunk.valid)
        return proposer


class _FromLast(Proposer):
    """Drafts from the hidden state of the last token alone."""

    def __init__(self, source: HeadDrafts) -> None:
        self.source = source
        self.hidden = torch.empty(0)
        """[B, N, H]; may be the memory that the next verification writes to."""
        self.last = torch.empty(0)
        """[B]: the row of it that counts."""

    def read(self, hidden: Tensor, valid: Tensor) -> None:
        """A chunk of the prompts [B, N, H], of which row b has valid[b] tokens."""
        self.hidden, self.last = ends_of(hidden, valid, self.hidden), torch.zeros_like(valid)

    def propose(self, text: Text, nodes: int) -> Draft:
        drafting = self.source.drafting(nodes)
        return draft_of(drafting, drafting.run(self.hidden, self.last, text.last()[:, None]))

    def observe(self, draft: Draft, logits: Tensor, accepted: Accepted, taps: tuple[Tensor, ...]) -> None:
        self.hidden, self.last = taps[0], accepted.node


class _FromContext(Proposer):
    """Drafts from what a step makes of the hidden states of all tokens; it has run over those before the last ones."""

    def __init__(self, source: HeadDrafts, context: Context, text: Text) -> None:
        self.source, self.context, self.text = source, context, text
        batch, device = len(text.lengths), text.lengths.device
        with torch.inference_mode(False):
            self.states = tuple(spec.allocate(batch, context.capacity, device) for spec in context.states)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        """Tokens of the prompts that were read."""
        self.hidden = torch.empty(0)
        """[B, N, H]: of the last tokens, which are still to be run over."""
        self.counts = torch.empty(0)
        """[B]: how many of them count."""
        self.waiting = False

    def read(self, hidden: Tensor, valid: Tensor) -> None:
        """A chunk of the prompts [B, N, H], of which row b has valid[b] tokens."""
        self.context.run(hidden, self._positions(self.seen, hidden), self.seen, *self.states)
        self.seen = self.seen + valid
        # The last token of each prompt is run over once more, by the first draft.
        self.hidden, self.counts, self.waiting = ends_of(hidden, valid, self.hidden), torch.ones_like(valid), True

    def propose(self, text: Text, nodes: int) -> Draft:
        drafting, before = self.source.drafting(nodes), self._before()
        positions, last = self._positions(before, self.hidden), (self.counts - 1).clamp(min=0)
        self.waiting = False
        return draft_of(
            drafting, drafting.run(self.hidden, positions, before, last, text.last()[:, None], *self.states)
        )

    def observe(self, draft: Draft, logits: Tensor, accepted: Accepted, taps: tuple[Tensor, ...]) -> None:
        if self.waiting:  # a token came without a draft
            before = self._before()
            self.context.run(self.hidden, self._positions(before, self.hidden), before, *self.states)
        path = accepted.path[..., None].expand(-1, -1, taps[0].shape[-1])
        self.hidden, self.counts, self.waiting = taps[0].gather(1, path), accepted.counts, True

    def _before(self) -> Tensor:
        """Tokens of each row before those in `hidden`; the text's last one is not verified yet."""
        return (self.text.lengths - 1 - self.counts).clamp(min=0)

    def _positions(self, before: Tensor, hidden: Tensor) -> Tensor:
        places = before[:, None] + torch.arange(hidden.shape[1], device=before.device)
        return places.clamp(max=self.context.max_length - 1)


def ends_of(hidden: Tensor, valid: Tensor, before: Tensor) -> Tensor:
    """The hidden state [B, 1, H] of each row's last token so far, from a chunk [B, N, H] of which row b has valid[b]
    tokens; a row that has ended keeps the one of the chunks before, which is empty at the first.
    """
    ends = at_node(hidden, (valid - 1).clamp(min=0))[:, None]
    return torch.where((valid > 0)[:, None, None], ends, before) if len(before) else ends


def draft_of(drafting: Drafting, results: tuple[Tensor, ...]) -> Draft:
    """The draft that a program returned."""
    if drafting.layout is not None:
        return Draft(results[0], drafting.layout)
    tokens, parents, ranks, depths, paths, words = results
    return Draft(tokens, Layout(parents, ranks, depths, paths, words, drafting.width))
