"""What a decoder keeps for speculation: bound drafters, what steps cost, compiled functions, defaults."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

from accelc.ir.errors import DraftError, TreeError
from accelc.runtime.arguments import check_count
from accelc.runtime.functions import Compile, Functions, TensorFunction
from accelc.runtime.speculation.acceptance import AcceptanceRule, rule_for
from accelc.runtime.speculation.choice import Acceptance, StepTimes
from accelc.runtime.speculation.draft import DRAFTERS, Drafter, DraftKind, Setting, Source, rooted
from accelc.runtime.speculation.registry import made


@dataclass(frozen=True)
class Wish:
    """What a call, or a decoder for calls that say nothing, asks for; see `Decoder.generate`."""

    draft: Drafter | str | bool | None = None
    accept: AcceptanceRule | str | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class Speculation:
    """How a generation speculates: a drafter that is bound to the decoder, and the rule for its drafts."""

    name: str
    source: Source
    rule: AcceptanceRule
    call: Functions
    times: StepTimes
    acceptance: Acceptance
    rooted: TensorFunction
    """`draft.rooted` for the decoder's vocabulary."""
    kind: DraftKind
    nodes: int | None = None
    """Nodes that a step verifies; None: chosen by measurement."""


@dataclass
class Speculator:
    """Turns wishes into speculations; ``room``: nodes that a tree may have in this decoder, 0 where it has no step for
    trees.
    """

    default: Wish
    compile_function: Compile | None
    room: int
    _sources: dict[Drafter, tuple[Source, Acceptance]] = field(default_factory=dict)
    _times: StepTimes = field(default_factory=StepTimes)
    rooted: TensorFunction | None = None
    """One object: functions are told apart by their identity."""

    def __post_init__(self) -> None:
        self.call = Functions(self.compile_function)

    def speculation(self, wish: Wish, setting: Setting, *, greedy: bool, seeded: bool = False) -> Speculation | None:
        """What a call does, None for plain decoding. ``seeded``: whether it must do the same again. Raises
        `DraftError`, `TreeError`, `InputError`.
        """
        asked = self.default.draft if wish.draft is None else wish.draft
        if asked is None or asked is False:
            for name, value in (("accept", wish.accept), ("draft_nodes", wish.nodes)):
                if value is not None:
                    raise DraftError(f"{name} is {value!r} and nothing drafts", remedy="Pass draft= as well.")
            return None
        nodes = self.default.nodes if wish.nodes is None else wish.nodes
        if nodes is not None:
            check_count("draft_nodes", nodes)
        drafter = made(DRAFTERS, asked)
        rule = rule_for(drafter.kind, self.default.accept if wish.accept is None else wish.accept, greedy=greedy)
        if not self.room:
            raise DraftError("this decoder has no step for trees", remedy="Make it with accelc.compile.")
        if drafter not in self._sources:
            compiler = setting.compile and self.call.compiling.timed(setting.compile)
            source = drafter.bind(replace(setting, call=self.call, compile=compiler))
            self._sources[drafter] = source, Acceptance(source.size)
        source, acceptance = self._sources[drafter]
        if source.size > self.room:
            raise TreeError(
                f"{drafter.name} drafts trees of {source.size} nodes, and the caches have room for {self.room}"
            )
        if self.rooted is None:
            readable = min(setting.vocab_size, setting.input_vocab_size or setting.vocab_size)
            self.rooted = functools.partial(rooted, vocabulary=readable)
        if nodes is None and seeded and not greedy and not rule.follows_seeds:
            nodes = source.size  # a number that is chosen by measurement would change what is drawn
        return Speculation(
            drafter.name, source, rule, self.call, self._times, acceptance, self.rooted, drafter.kind, nodes
        )
