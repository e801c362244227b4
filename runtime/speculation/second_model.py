"""Drafts of a second, smaller model with a decoder of its own: the runtime part of `accelc.DraftModel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelc.ir.errors import DraftError
from accelc.ir.sampling import draw_from
from accelc.runtime.decoder import Decoder
from accelc.runtime.session import Session, TappedChunk
from accelc.runtime.speculation.acceptance import at_node
from accelc.runtime.speculation.draft import Draft, DraftKind, Proposer, Setting, Source, Text
from accelc.runtime.speculation.target import TargetSampler
from accelc.runtime.speculation.trees import Layout, Tree


class SecondModel(Source):
    """Chains drawn from the model's own distribution, or trees of its likeliest tokens.

    tokens: of a chain; tree: in place of a chain.
    """

    def __init__(self, decoder: Decoder, tokens: int, tree: Tree | None, setting: Setting) -> None:
        for what, own, wanted in (
            ("scores", decoder.vocab_size, setting.vocab_size),
            ("reads", decoder.input_vocab_size, setting.input_vocab_size),
        ):
            if own != wanted:
                raise DraftError(
                    f"the draft model {what} {own} tokens, and the model {wanted}",
                    remedy="Both need one vocabulary: take a draft model with the same tokenizer.",
                )
        if tree is not None and tree.width > decoder.vocab_size:
            raise DraftError(
                f"a tree with {tree.width} candidates a node for {decoder.vocab_size} tokens",
                remedy="Leave out the nodes of the highest ranks.",
            )
        if decoder.max_length < setting.max_length:
            raise DraftError(
                f"the draft model's decoder holds {decoder.max_length} tokens, and the model's {setting.max_length}",
                remedy=f"Compile it with max_length={setting.max_length}.",
            )
        self.decoder, self.call = decoder, setting.call
        self.tree = None if tree is None else tree.by_level()
        self.size = tokens + 1 if tree is None else tree.size
        self.depth = tokens if tree is None else tree.depth
        self.layout = (self.tree or Tree.chain(tokens)).layout(setting.device)
        self._cut: dict[int, Layout] = {}

    def layout_of(self, nodes: int) -> Layout:
        """Of trees of at most so many nodes: one object for each number."""
        if nodes >= self.size:
            return self.layout
        if nodes not in self._cut:
            self._cut[nodes] = self.layout.cut(nodes)
        return self._cut[nodes]

    def start(self, text: Text, sampler: TargetSampler, prompts: Sequence[TappedChunk]) -> Proposer:
        known = [row[: int(length) - 1] for row, length in zip(text.tokens.cpu(), text.lengths.tolist())]
        session = self.decoder.start(known)
        return _Chain(session, self, sampler) if self.tree is None else _Tree(session, self)


class _Model(Proposer):
    """The second model holds what the first one has committed: what it drafted is what was verified, up to the length
    that was accepted. The last two tokens are run again, because the last draft was not run at all, and so are those
    that came without a draft.
    """

    def __init__(self, session: Session, source: SecondModel) -> None:
        self.session, self.source, self.call = session, source, source.call
        self.skipped = 0

    def skip(self) -> None:
        self.skipped += 1

    def behind(self, text: Text) -> Tensor:
        """Its logits [B, V] behind the last token of each row."""
        back, self.skipped = 1 << (1 + self.skipped).bit_length(), 0  # sizes are planned one by one: few of them
        while True:
            size = min(back, self.session.steps.chunk)
            start = (text.lengths - back).clamp(min=0)
            place = start[:, None] + torch.arange(size, device=start.device)
            self.session.lengths.copy_(start)
            logits = self.session.append(text.tokens.gather(1, place.clamp(max=text.tokens.shape[1] - 1)))
            back -= size
            if back == 0:
                self.session.lengths.copy_(text.lengths)  # what a short row ran behind its end does not count
                last = (text.lengths - 1 - start).clamp(max=size - 1)
                return at_node(logits, last)

    def close(self) -> None:
        self.session.close()


class _Chain(_Model):
    def __init__(self, session: Session, source: SecondModel, sampler: TargetSampler) -> None:
        super().__init__(session, source)
        self.sampler = sampler

    def propose(self, text: Text, nodes: int) -> Draft:
        layout = self.source.layout_of(nodes)
        tokens, count = [text.root[:, 0]], layout.size - 1
        shaping = self.sampler.shaping
        uniforms = self.sampler.own_uniforms(count) if shaping.samples else None
        proposed: list[Tensor] = []
        with self.session.alone():
            logits = self.behind(text)
            for index in range(count):
                if index:
                    logits = self.session.decode(tokens[-1])
                if uniforms is None:
                    (token,) = self.call(likeliest_token, logits.contiguous())
                    tokens.append(token.clone())  # the next call may write there
                    continue
                proposed.append(shaping.probabilities(logits.float()))
                tokens.append(draw_from(proposed[-1], uniforms[:, index]))
        drafts = torch.stack(tokens, dim=1)
        if uniforms is None:
            return Draft(drafts, layout)
        proposed.append(torch.zeros_like(proposed[0]))  # behind the last draft
        return Draft(drafts, layout, DraftKind.INDEPENDENT, torch.stack(proposed, dim=1))


class _Tree(_Model):
    def __init__(self, session: Session, source: SecondModel) -> None:
        super().__init__(session, source)
        assert source.tree is not None
        self.tree = source.tree
        depths = self.tree.depths
        self.ends = [sum(d <= depth for d in depths) for depth in range(self.tree.depth + 1)]

    def propose(self, text: Text, nodes: int) -> Draft:
        layout = self.source.layout_of(nodes)
        parents, ranks = layout.parents[0], layout.ranks[0]
        tokens = text.root
        with self.session.alone():
            scores = self.behind(text)[:, None]  # of the nodes so far
            for begin, whole in zip(self.ends, self.ends[1:]):
                end = min(whole, layout.size)
                best = torch.ops.accelc.top_k(scores.contiguous(), self.tree.width)  # [B, nodes, K]
                level = slice(begin, end)
                tokens = torch.cat([tokens, best[:, parents[level], ranks[level]]], dim=1)
                if end == layout.size:
                    break
                self.session.lengths.copy_(text.lengths - 1)
                known = self.source.layout_of(end)
                scores = self.session.verify(tokens, known.depths, known.words)
        return Draft(tokens, layout)


def likeliest_token(logits: Tensor) -> tuple[Tensor]:
    """The token [B] with the largest logit [B, V]."""
    return (torch.ops.accelc.top_k(logits, 1).squeeze(1),)
