"""The speculative decoding loop: propose a tree, verify it in one step, keep a path, until every row has ended."""

from __future__ import annotations

import functools
from collections.abc import Generator
from dataclasses import dataclass, field, replace

import torch

from accelc.ir.errors import AccelcError, DraftError
from accelc.runtime.clock import clock_of
from accelc.runtime.generation import Generation, Row
from accelc.runtime.result import GenerateResult
from accelc.runtime.session import TappedChunk
from accelc.runtime.speculation.choice import SizeChooser
from accelc.runtime.speculation.draft import Draft, Proposer, Text
from accelc.runtime.speculation.outcome import Outcome, packed
from accelc.runtime.speculation.plain_steps import PlainSteps
from accelc.runtime.speculation.replay import EndOfPart, Replay, Result
from accelc.runtime.speculation.speculator import Speculation
from accelc.runtime.speculation.statistics import Recorder
from accelc.runtime.speculation.target import Target, TargetSampler
from accelc.runtime.speculation.trees import Layout, Tree


@dataclass
class SpeculativeGeneration(Generation):
    """A generation whose steps verify the trees of a drafter. Rows take different numbers of tokens a step."""

    speculation: Speculation = field(kw_only=True)
    _proposer: Proposer | None = None
    _layouts: dict[tuple[Layout, int], Layout] = field(default_factory=dict)
    """Of trees that were cut."""
    _root: Layout | None = None
    """Of a step without drafts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._clock = clock_of(self.session.steps.device)
        self._recorder = Recorder(self._clock)

    def run(self) -> Generator[list[Row], None, None]:
        """Yield, token by token, the rows that took one. The caller holds the lock and inference mode."""
        try:
            yield from self._run()
        finally:
            if self._proposer is not None:
                self._proposer.close()

    def _run(self) -> Generator[list[Row], None, None]:
        session, source, nodes = self.session, self.speculation.source, self.speculation.nodes
        begun = self.now()
        session.tap(source.passes)
        tapped: list[TappedChunk] = []
        logits = session.prefill(self.prompts, tapped)  # [B, V]
        given = (self.params, self.seeds, self.prompts, logits, self.speculation.call)
        sampler = TargetSampler.of(*given, most=max(row.budget for row in self.rows), ahead=source.depth)
        session.synchronize()
        self.prefill_seconds = self.now() - begun
        text = self._text(logits.device, source.depth + 1)
        plain = PlainSteps(session, sampler, text, source.depth + 1)
        chooser = SizeChooser(self.speculation.times, len(self.rows), source.size, self.speculation.acceptance)
        readable = self._readable(logits)
        active, going = self.rows, list(range(len(self.rows)))
        counts, behind = [1] * len(self.rows), False
        tokens = [[token] for token in plain.choose(logits)]
        plain.wait([token for (token,) in tokens], active)
        while True:
            self.seconds += self.now() - begun
            if not self.steps:
                self.first_token_seconds = self.seconds
            yield from self._take(active, tokens, counts)
            begun = self.now()
            if ended := [row.index for row in active if row.finish is not None]:
                session.retire(ended)
                active = [row for row in active if row.finish is None]
                going = [row.index for row in active]
                if not active:
                    return
            if readable is not None:
                self._require_readable(active, readable)
            if self._proposer is None:
                plain.settle()
                self._proposer = source.start(text, sampler, tapped)
                replay = Replay(text.call, self._clock, repeatable=self._proposer.repeatable)
            size = nodes or chooser.size
            started = self.now()
            if size == 1 and not source.reads_all:
                self._proposer.skip()
                replay.forget()
                behind = bool(source.passes)
                chosen = plain.step(active)
                plain.wait(chosen, active)
                tokens, counts = [[token] for token in chosen], [1] * len(chosen)
                took = self.now() - started
                self._recorder.add_plain(going, took)
                if nodes is None:
                    chooser.add_plain(took)
            else:
                plain.settle()
                catches_up, behind = behind, False  # first what the passes add to the last token
                drafted = 1 if catches_up else size
                step = functools.partial(self._speculate, self._proposer, text, sampler, drafted)
                (draft, accepted, row), marks = replay.run(drafted, step)
                outcome = Outcome.read(row, accepted)  # here the host waits
                counts, tokens = outcome.counts, outcome.tokens
                sampler.count(accepted.tokens, accepted.counts, counts)
                self._recorder.add(draft.layout, outcome, going, marks)
                if nodes is None and not catches_up:
                    paths = outcome.paths
                    seconds = self.now() - started if replay.settled(drafted) else None
                    chooser.add([paths[row] for row in going], seconds)
            self.steps += 1

    def _speculate(
        self, proposer: Proposer, text: Text, sampler: TargetSampler, size: int, end_of_part: EndOfPart
    ) -> Result:
        """Draft, verify, keep a path and learn from it: the parts of a step, without waiting for the device."""
        session = self.session
        draft = self._draft(proposer, text, size)
        end_of_part()
        logits = session.verify(draft.tokens, draft.layout.depths, draft.layout.words)
        end_of_part()
        accepted = self.speculation.rule.accept(Target(sampler, draft, logits, session.active))
        session.commit(accepted.path, accepted.counts)
        end_of_part()
        proposer.observe(draft, logits, accepted, session.taps)
        text.append(accepted.tokens, accepted.counts)
        row = packed(draft, accepted, self.speculation.call)
        end_of_part()
        return Result(draft, accepted, row)

    def _draft(self, proposer: Proposer, text: Text, size: int) -> Draft:
        """A tree of at most `size` nodes."""
        if size == 1:
            proposer.skip()
            if self._root is None:
                self._root = Tree.chain(0).layout(text.tokens.device)
            return Draft(text.root, self._root)
        speculation = self.speculation
        draft = self._propose(proposer, text, size)
        layout = draft.layout
        if layout.size > size:
            cut = (layout, size)
            if cut not in self._layouts:
                self._layouts[cut] = layout.cut(size)
            layout = self._layouts[cut]
        return draft.rooted(text.root, layout, speculation.rooted, speculation.call)

    def _propose(self, proposer: Proposer, text: Text, size: int) -> Draft:
        """What a drafter of whatever origin says, as far as the host can check it. Raises `DraftError`."""
        used = self.speculation
        what = f"the drafter {used.name!r}"
        try:
            draft = proposer.propose(text, size)
        except AccelcError:
            raise
        except Exception as error:  # somebody else's code can raise anything; it is chained
            raise DraftError(f"{what} failed: {type(error).__name__}: {error}") from error
        if not isinstance(draft, Draft):
            raise DraftError(f"{what} proposed {type(draft).__name__}", remedy="Return a Draft from propose().")
        draft.check(what, len(self.rows), used.kind, used.source.size, used.source.depth)
        return draft

    @staticmethod
    def _take(active: list[Row], tokens: list[list[int]], counts: list[int]) -> Generator[list[Row], None, None]:
        """Give rows their tokens of one step, one at a time; what lies behind the end of a row is dropped."""
        if len(active) == 1:
            for token in tokens[active[0].index][: counts[active[0].index]]:
                active[0].accept(token)
                yield active
                if active[0].finish is not None:
                    return
            return
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
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        return Text(tokens.to(device), lengths, self.speculation.call)

    def result(self) -> GenerateResult:
        """Everything so far, with the statistics of speculation."""
        result, used = super().result(), self.speculation
        # The first token of each row came from its prompt.
        taken = [len(row.tokens) - 1 for row in self.rows]
        summary = self._recorder.summary(used.name, used.rule.name, taken, exactness=used.rule.exactness)
        return replace(result, statistics=replace(result.statistics, speculation=summary))
