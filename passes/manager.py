"""Pipelines: passes in order, checked after each one, with counts, timings and the composed guarantee kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from torch import Tensor

from accelc.ir import Exactness, PassRecord, Program, check
from accelc.ir.errors import (
    ExactnessError,
    InvariantError,
    PassMatchError,
    PassMutationError,
    UnknownPassError,
    VerifyError,
)
from accelc.passes.base import Pass, PassResult
from accelc.passes.order import check_requirements, order
from accelc.passes.registry import known_passes
from accelc.passes.verify import comparable, compare

DISABLE = "ACCELC_DISABLE_PASSES"
"""Environment variable: names of passes to leave out of every pipeline, separated by commas."""

Inputs = Sequence[Tensor] | Callable[[Program], Sequence[Tensor] | None]
"""Real inputs (then states) to run programs on, or a function that gives those of a program, None for "do not run"."""


class Pipeline:
    """Passes, ordered by their constraints; `run` applies them to a program.

    `disabled` names passes to leave out, as does the environment variable ``ACCELC_DISABLE_PASSES``. Raises
    `PassOrderError` for a cycle and `UnknownPassError` for a disabled name that is no pass.
    """

    def __init__(self, passes: Sequence[Pass], *, disabled: Collection[str] = ()) -> None:
        self.passes = order(passes)
        switched_off = {name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
        self.disabled = frozenset(disabled) | switched_off
        unknown = self.disabled - {p.name for p in self.passes}
        if unknown:  # names of passes in other pipelines are fine, typing errors are not
            unknown -= set(known_passes())
        if unknown:
            raise UnknownPassError(
                f"cannot disable {', '.join(sorted(unknown))}: no such pass",
                where=f"disabled= or {DISABLE}",
                remedy=f"Passes of this pipeline: {', '.join(p.name for p in self.passes)}.",
            )

    def run(
        self,
        program: Program,
        *,
        require: Exactness = Exactness.LOSSY,
        verify: Inputs | None = None,
        tolerance: float | None = None,
        dump: str | Path | None = None,
    ) -> Program:
        """Apply the passes one after another.

        After each pass the invariants of `accelc.ir.check` must hold, the pass must have matched as often as it
        declares and must have left its input alone; what it did is appended to the program's history.

        * ``require``: the weakest guarantee accepted; before any pass runs, `ExactnessError` names the weaker ones.
        * ``verify``: inputs to compare each program on with the one before; a pass that promises EXACT and exceeds
          ``tolerance`` (relative; default by dtype) raises `VerifyError`. Other passes get their error noted.
        * ``dump``: a folder that gets a listing of the program before the first and after each pass.
        """
        self._check_before(program, require)
        folder = Path(dump) if dump is not None else None
        _dump(folder, 0, "input", program)
        for number, (one, program) in enumerate(self._steps(program, verify, tolerance), 1):  # noqa: B020
            _dump(folder, number, one.name, program)
        return program

    def steps(self, program: Program) -> Iterator[tuple[Pass, Program]]:
        """Each pass with the program it leaves, computed one at a time; disabled passes are left out."""
        self._check_before(program, Exactness.LOSSY)
        for one, program in self._steps(program, None, None):  # noqa: B020
            if one.name not in self.disabled:
                yield one, program

    def active(self) -> list[Pass]:
        """The passes in order, without the disabled ones."""
        return [p for p in self.passes if p.name not in self.disabled]

    def _steps(
        self, program: Program, verify: Inputs | None, tolerance: float | None
    ) -> Iterator[tuple[Pass, Program]]:
        for one in self.passes:
            if one.name in self.disabled:
                record = PassRecord(one.name, one.options(), 0, 0.0, Exactness.EXACT, ("disabled",))
                program = replace(program, history=(*program.history, record))
            else:
                program = apply(one, program, verify, tolerance)
            yield one, program

    def _check_before(self, program: Program, require: Exactness) -> None:
        active = self.active()
        check_requirements(active, program.facts)
        weak = [f"{p.name} is {p.exactness}" for p in active if p.exactness < require]
        if program.exactness < require:
            weak.insert(0, f"the program {program.name!r} is {program.exactness} already")
        if weak:
            raise ExactnessError(
                f"the pipeline would not be {require}, as required",
                where="; ".join(weak),
                remedy="Leave these passes out, or accept a weaker guarantee.",
            )

    def __str__(self) -> str:
        return " -> ".join(f"[{p}]" if p.name in self.disabled else str(p) for p in self.passes)


def apply(one: Pass, program: Program, verify: Inputs | None = None, tolerance: float | None = None) -> Program:
    """Run one pass with all the checks and records that `Pipeline.run` describes."""
    untouched = _state_of(program)
    start = time.perf_counter()
    try:
        result = one.run(program)
    except Exception as error:
        error.add_note(f"in pass {one}")
        raise
    seconds = time.perf_counter() - start
    if not isinstance(result, PassResult):
        raise TypeError(f"pass {one.name!r} must return a PassResult, not {type(result).__name__}")
    if _state_of(program) != untouched:
        raise PassMutationError(f"pass {one.name!r} modified the program it was given", where=str(one))
    _check_matches(one, result.matches)
    try:
        check(result.program)
    except InvariantError as error:
        raise InvariantError(f"pass {one.name!r}: {error.what}", where=error.where) from error
    notes = (*result.notes, *_verify(one, program, result.program, verify, tolerance))
    record = PassRecord(one.name, one.options(), result.matches, seconds, one.exactness, notes)
    return replace(
        result.program,
        exactness=Exactness.compose(program.exactness, one.exactness),
        history=(*program.history, record),
        facts={**dict.fromkeys(one.ensures, True), **result.program.facts},
    )


def report(program: Program) -> Table:
    """What the passes did to a program, as a table for `rich.print`."""
    table = Table(title=f"{program.name}: {program.exactness}", title_justify="left")
    table.add_column("pass", no_wrap=True)
    for column in ("matches", "ms"):
        table.add_column(column, justify="right")
    for column in ("guarantee", "options", "notes"):
        table.add_column(column, overflow="fold")
    for record in program.history:
        options = "\n".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in record.options.items())
        table.add_row(
            record.name,
            str(record.matches),
            f"{record.seconds * 1e3:.1f}",
            str(record.exactness),
            options,
            "\n".join(record.notes),
        )
    return table


def _state_of(program: Program) -> tuple[object, ...]:
    """Whatever a pass must not touch in its input: nodes and what they call, versions of tensors, facts."""
    nodes = tuple((n, n.op, n.target, n.args, tuple(n.kwargs.items())) for n in program.graph.nodes)
    tensors = tuple((name, id(t), t._version) for name, t in program.tensors().items())
    return nodes, tensors, dict(program.facts)


def _check_matches(one: Pass, matches: int) -> None:
    low, high = one.expected_matches
    if matches < low or (high is not None and matches > high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise PassMatchError(f"pass {one.name!r} matched {matches} times and expects {wanted}", where=str(one))


def _verify(
    one: Pass, before: Program, after: Program, inputs: Inputs | None, tolerance: float | None
) -> tuple[str, ...]:
    if callable(inputs):
        inputs = inputs(before)
    if inputs is None:
        return ()
    if reason := comparable(before, after):
        return (f"not compared: {reason}",)
    if len(inputs) != len(before.inputs) + len(before.states):
        return (f"not compared: {len(inputs)} inputs given for {len(before.placeholders())} placeholders",)
    differences = compare(before, after, inputs, tolerance)
    failed = [d for d in differences if not d.passed]
    if failed and one.exactness is Exactness.EXACT:
        raise VerifyError(
            f"pass {one.name!r} is declared exact but changed the results", where="; ".join(map(str, failed))
        )
    return tuple(map(str, differences))


def _dump(folder: Path | None, number: int, name: str, program: Program) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}-{name}.txt").write_text(program.listing() + "\n", encoding="utf-8")
