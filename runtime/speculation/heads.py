"""Drafts of networks on a model's last hidden states: the runtime part of `accelc.Medusa` and `accelc.Hydra`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir import StateSpec
from accelc.runtime.functions import Functions, TensorFunction, put
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

    @functools.cached_property
    def place(self) -> TensorFunction:
        """`behind`, one object for all generations: functions are told apart by their identity."""
        return functools.partial(behind, end=self.max_length)


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
        call: Functions,
    ) -> None:
        self.drafting, self.passes, self.context, self.call = drafting, passes, context, call
        self.size, self.depth = size, depth
        self.reads_all = context is not None

    def start(self, text: Text, sampler: TargetSampler, prompts: Sequence[TappedChunk]) -> Proposer:
        proposer = _FromLast(self) if self.context is None else _FromContext(self, self.context, text)
        for chunk in prompts:
            proposer.read(chunk.taps[0], chunk.valid)
        return proposer


class _FromLast(Proposer):
    """Drafts from the hidden state of the last token alone."""

    repeatable = True

    def __init__(self, source: HeadDrafts) -> None:
        self.source = source
        self.hidden = torch.empty(0)
        """[B, 1, H]: of the last tokens; written to, so that drafts read the same memory each time."""
        self.last = torch.empty(0)
        """[B]: zeros, the row of it that counts."""

    def read(self, hidden: Tensor, valid: Tensor) -> None:
        """A chunk of the prompts [B, N, H], of which row b has valid[b] tokens."""
        self.hidden, self.last = ends_of(hidden, valid, self.hidden).contiguous(), torch.zeros_like(valid)

    def propose(self, text: Text, nodes: int) -> Draft:
        drafting = self.source.drafting(nodes)
        return draft_of(drafting, self.source.call.step(drafting.run, self.hidden, self.last, text.root))

    def observe(self, draft: Draft, logits: Tensor, accepted: Accepted, taps: tuple[Tensor, ...]) -> None:
        self.source.call(keep_last, taps[0], accepted.node, self.hidden)


class _FromContext(Proposer):
    """Drafts from what a step makes of the hidden states of all tokens; it has run over those before the last ones."""

    repeatable = True

    def __init__(self, source: HeadDrafts, context: Context, text: Text) -> None:
        self.source, self.context, self.text, self.call = source, context, text, source.call
        batch, device = len(text.lengths), text.lengths.device
        with torch.inference_mode(False):
            self.states = tuple(spec.allocate(batch, context.capacity, device) for spec in context.states)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        """Tokens of the prompts that were read."""
        self.hidden = torch.empty(0)
        """[B, N, H]: of the last tokens, which are still to be run over."""
        self.kept: dict[int, Tensor] = {}
        """What it is written to, by N."""
        self.counts = torch.empty(0)
        """[B]: how many of them count."""
        self.waiting = False

    def read(self, hidden: Tensor, valid: Tensor) -> None:
        """A chunk of the prompts [B, N, H], of which row b has valid[b] tokens."""
        self.context.run(hidden, positions_from(self.seen, hidden.shape[1], self.context.max_length), self.seen,
                         *self.states)  # fmt: skip
        self.seen = self.seen + valid
        # The last token of each prompt is run over once more, by the first draft.
        self.hidden, self.counts, self.waiting = ends_of(hidden, valid, self.hidden), torch.ones_like(valid), True

    def propose(self, text: Text, nodes: int) -> Draft:
        drafting = self.source.drafting(nodes)
        before, positions, last = self._places()
        self.waiting = False
        return draft_of(
            drafting, self.call.step(drafting.run, self.hidden, positions, before, last, text.root, *self.states)
        )

    def observe(self, draft: Draft, logits: Tensor, accepted: Accepted, taps: tuple[Tensor, ...]) -> None:
        if self.waiting:  # a token came without a draft
            before, positions, _ = self._places()
            self.call.step(self.context.run, self.hidden, positions, before, *self.states)
        count = accepted.path.shape[1]
        if count not in self.kept:
            self.kept[count] = taps[0].new_zeros(len(taps[0]), count, taps[0].shape[2])
        self.hidden = self.kept[count]
        self.call(keep_path, taps[0], accepted.path, accepted.counts, self.hidden, self.counts)
        self.waiting = True

    def _places(self) -> tuple[Tensor, ...]:
        """Of the tokens in `hidden`; the text's last one is not verified yet."""
        return self.call(self.context.place, self.text.lengths, self.counts, self.hidden)


def behind(lengths: Tensor, counts: Tensor, hidden: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """For hidden states [B, N, H] whose first counts [B] belong to the last tokens but one of texts of lengths [B]:
    tokens before them [B], positions [B, N] below `end`, the last one that counts [B].
    """
    before = (lengths - 1 - counts).clamp(min=0)
    return before, positions_from(before, hidden.shape[1], end), (counts - 1).clamp(min=0)


def positions_from(before: Tensor, count: int, end: int) -> Tensor:
    """Positions [B, count] behind so many tokens [B]; what would be no position is the last one."""
    return (before[:, None] + torch.arange(count, device=before.device)).clamp(max=end - 1)


def keep_path(hidden: Tensor, path: Tensor, counts: Tensor, kept: Tensor, many: Tensor) -> tuple[Tensor]:
    """Write the entries of hidden [B, N, H] on a path [B, D + 1] into kept [B, D + 1, H], and counts [B] into many.
    Returns the entries.
    """
    put(many[:, None], counts[:, None])
    return keep(hidden, path, kept)


def keep_last(hidden: Tensor, node: Tensor, kept: Tensor) -> tuple[Tensor]:
    """Write the entry of hidden [B, N, H] at a node [B] of each row into kept [B, 1, H]. Returns it."""
    return keep(hidden, node[:, None], kept)


def keep(hidden: Tensor, path: Tensor, kept: Tensor) -> tuple[Tensor]:
    """Write the entries of hidden [B, N, H] at nodes [B, K] into kept [B, K, H]. Returns them."""
    rows = hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
    torch.ops.accelc.cache_update(kept, rows, path[:, 0] - path[:, 0], 1)
    return (rows,)


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
    # Statistics are made of layouts later, and the next call may write to these.
    tokens, (parents, ranks, depths, paths, words) = results[0], [tensor.clone() for tensor in results[1:]]
    return Draft(tokens, Layout(parents, ranks, depths, paths, words, drafting.width))
