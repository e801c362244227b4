"""Repeats speculative steps: once a step makes the calls that the one before made, those alone are made from then on.

Most of what a step takes outside of its programs is Python that finds out again what to call with which tensors, in
caches that the model's weights have just swept. But all that changes from step to step stands in the tensors: if a step
did nothing but bound calls, the same ones as the step before, then so will the next, until another size of tree is
asked for or a token comes without a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from torch.overrides import TorchFunctionMode

from accelc.runtime.clock import Clock, Mark
from accelc.runtime.functions import Call, Functions
from accelc.runtime.speculation.draft import Accepted, Draft

TRIES = 12
"""Steps of one size that are looked at before it is given up: their calls differ each time, or torch runs besides."""
BINDING = 3
"""The first of these steps also bind what is called, and take longer for it."""
READS = frozenset({"__get__", "__len__", "size", "dim", "stride", "numel", "is_contiguous", "data_ptr", "element_size"})
"""What asks a tensor about itself, not about its values."""

EndOfPart: TypeAlias = Callable[[], None]


class Result(NamedTuple):
    """What a step gives."""

    draft: Draft
    accepted: Accepted
    packed: Tensor
    """What the host reads of it; see `Outcome`."""


@dataclass(frozen=True)
class Step:
    """What a step called, part by part, and what it gave: the same objects each time, written anew."""

    size: int
    parts: tuple[tuple[Call | None, ...], ...]
    result: Result

    def same(self, other: Step) -> bool:
        """Whether the other step called and gave the same."""
        given = zip(self._given(), other._given(), strict=True)
        return (self.size, self.parts) == (other.size, other.parts) and all(a is b for a, b in given)

    def _given(self) -> tuple[object, ...]:
        draft, accepted, packed = self.result
        return *vars(draft).values(), *vars(accepted).values(), packed


class Outside(TorchFunctionMode):
    """Notices torch functions, but for those that only read what a tensor is."""

    noticed = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.noticed = self.noticed or getattr(func, "__name__", "") not in READS
        return func(*args, **(kwargs or {}))


class Replay:
    """Runs the steps of one generation, and repeats those that can be. ``repeatable``: that of the proposer."""

    def __init__(self, call: Functions, clock: Clock, *, repeatable: bool) -> None:
        self._call, self._clock, self._repeatable = call, clock, repeatable
        self._last: Step | None = None
        self.steady = False
        """Whether the last step made the calls of the one before."""
        self._tried: dict[int, int] = {}

    def forget(self) -> None:
        """A token comes without a tree: what the step after it does is open."""
        self._last, self.steady = None, False

    def settled(self, size: int) -> bool:
        """Whether the last step, of this size, took as long as others will."""
        return self.steady or not self._repeatable or self._tried.get(size, 0) >= BINDING

    def run(self, size: int, step: Callable[[EndOfPart], Result]) -> tuple[Result, list[Mark]]:
        """One step with a tree of `size` nodes, which calls what it is given at the end of each of its parts; with the
        marks between those.
        """
        mark, last = self._clock.mark, self._last
        marks = [mark()]
        if self.steady and last is not None and last.size == size:
            for calls in last.parts:
                for call in calls:
                    call()  # type: ignore[misc]
                marks.append(mark())
            return last.result, marks
        self.steady = False
        made: list[Call | None] = []
        ends = [0]

        def end_of_part() -> None:
            marks.append(mark())
            ends.append(len(made))

        tries = self._tried.get(size, 0)
        if not self._repeatable or tries == TRIES:
            self._last = None
            return step(end_of_part), marks
        self._call.made = made
        try:
            with Outside() as outside:
                result = step(end_of_part)
        finally:
            self._call.made = None
        self._last = None
        if None not in made and not outside.noticed:
            self._last = Step(size, tuple(tuple(made[b:e]) for b, e in pairwise(ends)), result)
            self.steady = last is not None and last.same(self._last)
        self._tried[size] = 0 if self.steady else tries + 1
        return result, marks
