"""Which pass breaks it: runs a pipeline pass by pass until a check fails, and writes a reproduction of that step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import AccelcError, PassError
from accelc.passes.base import Pass
from accelc.passes.manager import Inputs, Pipeline
from accelc.passes.reproduce import save_reproduction


@dataclass(frozen=True)
class Culprit:
    """The first pass after which the check failed."""

    number: int
    """Its place in the pipeline's order, counted from 1 without disabled passes."""
    one: Pass
    before: Program
    after: Program | None
    """None when the pass itself raised an error."""
    reason: str
    folder: Path | None
    """Where the reproduction was written."""

    def __str__(self) -> str:
        where = f"; reproduction in {self.folder}" if self.folder else ""
        return f"pass {self.number}, {self.one}: {self.reason}{where}"


def bisect(
    pipeline: Pipeline,
    program: Program,
    check: Callable[[Program], bool | None],
    *,
    inputs: Inputs | None = None,
    folder: str | Path | None = None,
) -> Culprit | None:
    """Find the first pass that breaks `check`; None when the whole pipeline keeps it.

    `check` gets a program and says that it is good by True or None, and that it is broken by False, an AssertionError
    or an `AccelcError`. A pass that raises an `AccelcError` itself (it matched nothing, it broke an invariant) is a
    culprit too. Every program on the way is checked, so the answer is right also where a later pass mends the fault.
    With `folder`, the program before the pass, the pass and `inputs` are written there with a script that runs them.

    Raises `PassError` when `program` fails the check before any pass.
    """
    if reason := _failure(check, program):
        raise PassError(
            f"the program {program.name!r} fails the check before any pass: {reason}",
            remedy="Bisecting needs a check that the input of the pipeline passes.",
        )
    before = program
    steps = pipeline.steps(program)
    for number, one in enumerate(pipeline.active(), 1):
        after: Program | None = None
        try:
            _, after = next(steps)
            reason = _failure(check, after)
        except AccelcError as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            place = Path(folder) if folder is not None else None
            if place is not None:
                what = f"{one.name} is the first pass that breaks the check: {reason}"
                save_reproduction(place, before, one, _inputs_of(before, inputs), what, after)
            return Culprit(number, one, before, after, reason, place)
        assert after is not None
        before = after
    return None


def _failure(check: Callable[[Program], bool | None], program: Program) -> str:
    """Why the check fails; empty when it holds."""
    try:
        result = check(program)
    except (AssertionError, AccelcError) as error:
        return f"{type(error).__name__}: {error}"
    return "the check returned False" if result is False else ""


def _inputs_of(program: Program, inputs: Inputs | None) -> Sequence[Tensor] | None:
    return inputs(program) if callable(inputs) else inputs
