"""The speculative decoding loop: propose a tree, verify it in one step, keep a path, until every row has ended."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from accelc.runtime.generation import Generation, Row
from accelc.runtime.result import GenerateResult
from accelc.runtime.session import TappedChunk
from accelc.runtime.speculation.choice import SizeChooser
from accelc.runtime.speculation.draft import Accepted, Draft, Proposer, Text
from accelc.runtime.speculation.speculator import Speculation
from accelc.runtime.speculation.statistics import Recorder
from accelc.runtime.speculation.target import Target, TargetSampler
from accelc.runtime.speculation.trees import Layout, Tree


@dataclass
class SpeculativeGeneration(Generation):
    """A generation whose steps verify the trees of a drafter. Rows take different numbers of tokens a step."""

    speculation: Speculation = field(kw_only=True)
    recorder: Recorder = field(default_factory=Recorder)
    _proposer: Proposer | None = None
    _layouts: dict[tuple[Layout, int], Layout] = field(default_factory=dict)
    """Of trees that were cut."""
    _root: Layout | None = None
    """Of a step without drafts."""
    _nothing: Tensor | None = None
    """Zeros [B]."""

    def run(self) -> Generator[list[Row], None, None]:
        """Yield, token by token, the rows that took one. The caller holds the lock and inference mode."""
        try:
            yield from self._run()
        finally:
            if self._proposer is not None:
                self._proposer.close()

    def _run(self) -> Generator[list[Row], None, None]:
        session, source, rule = self.session, self.speculation.source, self.speculation.rule
        begun = perf_counter()
        session.tap(source.passes)
        tapped: list[TappedChunk] = []
        logits = session.prefill(self.prompts, tapped)  # [B, V]
        sampler = TargetSampler.of(self.params, self.seeds, self.prompts, logits, self.speculation.call)
        session.synchronize()
        self.prefill_seconds = perf_counter() - begun
        tokens = sampler.following(logits)[:, None]
        counts = torch.ones_like(sampler.new)
        text = self._text(tokens.device, source.depth + 1)
        chooser = SizeChooser(self.speculation.times, len(self.rows), source.size)
        readable = self._readable(logits)
        active = self.rows
        while True:
            text.append(tokens, counts)
            sampler.count(tokens, counts, int(counts.max()))
            self.seconds += perf_counter() - begun
            if not self.steps:
                self.first_token_seconds = self.seconds
            yield from self._take(active, tokens.tolist(), counts.tolist())
            begun = perf_counter()
            if ended := [row.index for row in active if row.finish is not None]:
                session.retire(ended)
                active = [row for row in active if row.finish is None]
                if not active:
                    return
            if readable is not None:
                self._require_readable(active, readable)
            times = [perf_counter()]
            if self._proposer is None:
                self._proposer = source.start(text, sampler, tapped)
            size = self.speculation.nodes or chooser.size
            if size == 1 and not source.passes:
                draft, accepted = self._plain(self._proposer, text, sampler)
                counts = session.generating
                times += 4 * [perf_counter()]
            else:
                draft = self._draft(self._proposer, text, size)
                times.append(perf_counter())
                logits = session.verify(draft.tokens, draft.layout.depths, draft.layout.words)
                session.synchronize()
                times.append(perf_counter())
                accepted = rule.accept(Target(sampler, draft, logits))
                counts = session.commit(accepted.path, accepted.counts)
                times.append(perf_counter())
                self._proposer.observe(draft, logits, accepted, session.taps)
                times.append(perf_counter())
            tokens = accepted.tokens
            self.steps += 1
            rows = [row.index for row in active]
            self.recorder.add(draft, accepted, rows, times)
            if self.speculation.nodes is None:
                kept = zip(accepted.path.tolist(), accepted.counts.tolist())
                paths = [path[:count] for row, (path, count) in enumerate(kept) if row in rows]
                chooser.add(paths, times[-1] - times[0])

    def _plain(self, proposer: Proposer, text: Text, sampler: TargetSampler) -> tuple[Draft, Accepted]:
        """A step of plain decoding, which is a draft of the root alone, by the step of one token."""
        proposer.skip()
        root = text.last()
        tokens = sampler.following(self.session.decode(root))[:, None]
        if self._nothing is None:
            self._nothing = torch.zeros_like(root)
        nothing = self._nothing
        return Draft(root[:, None], self._alone(root.device)), Accepted(nothing, nothing[:, None], nothing + 1, tokens)

    def _alone(self, device: torch.device) -> Layout:
        if self._root is None:
            self._root = Tree.chain(0).layout(device)
        return self._root

    def _draft(self, proposer: Proposer, text: Text, size: int) -> Draft:
        """A tree of at most `size` nodes."""
        if size == 1:
            proposer.skip()
            return Draft(text.last()[:, None], self._alone(text.tokens.device))
        draft = proposer.propose(text, size)
        if draft.layout.size <= size:
            return draft
        cut = (draft.layout, size)
        if cut not in self._layouts:
            self._layouts[cut] = draft.layout.cut(size)
        return draft.cut(self._layouts[cut])

    @staticmethod
    def _take(active: Sequence[Row], tokens: list[list[int]], counts: list[int]) -> Generator[list[Row], None, None]:
        """Give rows their tokens of one step, one at a time; what lies behind the end of a row is dropped."""
        for place in range(max(counts)):
            taking = [row for row in active if row.finish is None and place < counts[row.index]]
            for row in taking:
                row.accept(tokens[row.index][place])
            if taking:
                yield taking

    def _text(self, device: torch.device, ahead: int) -> Text:
        """An empty output behind the prompts; a row's last step may go `ahead` beyond its end, and writes as much."""
        longest = max(len(prompt) + row.budget for prompt, row in zip(self.prompts, self.rows)) + 2 * ahead
        # Of a few lengths: functions of the text are compiled for each.
        tokens = torch.zeros(len(self.rows), 1 << longest.bit_length(), dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            tokens[row, : len(prompt)] = prompt
        return Text(tokens.to(device), torch.tensor([len(prompt) for prompt in self.prompts], device=device))

    def result(self) -> GenerateResult:
        """Everything so far, with the statistics of speculation."""
        result, summary = super().result(), self.recorder.summary(self.speculation.name, self.speculation.rule.name)
        return replace(result, statistics=replace(result.statistics, speculation=summary))
