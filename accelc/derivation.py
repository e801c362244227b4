"""From a model to its programs: from the cache where an earlier process stored them, captured and derived otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from accelc.capture import capture
from accelc.confirm import confirm
from accelc.decoder import CompileReport
from accelc.fingerprint import fingerprint
from accelc.ir import Exactness, Program
from accelc.ir.errors import PassError
from accelc.passes import Pass
from accelc.passes.check_step import check_step
from accelc.pipeline import example_inputs, prefill_pipeline, step_pipeline
from accelc.program_cache import folded_parameters, forget_programs, load_programs, store_programs
from accelc.runtime.steps import StepFunction

log = logging.getLogger(__name__)

Check = Literal["full", "quick", "off"]
Programs: TypeAlias = dict[str, Program]

CHECK_LENGTH = {"full": 24, "quick": 10}
"""Tokens that a check runs."""


@dataclass(frozen=True)
class Request:
    """What decides the programs of a model, and how thoroughly they are checked; see `accelc.compile`."""

    max_length: int
    capacity: int
    """Slots of the states that the step is checked with."""
    passes: Sequence[Pass] = ()
    disable: Collection[str] = ()
    require: Exactness = Exactness.DISTRIBUTION
    check: Check = "quick"
    cache: bool = True
    verify: bool = False

    def key(self, model: nn.Module) -> str | None:
        """The key of the programs in the cache; None where they cannot come from there: passes of others may change
        without a trace in the key, and a full check needs the forward anyway.
        """
        if not self.cache or self.passes or self.check == "full" or self.verify:
            return None
        pipelines = f"{step_pipeline(disabled=self.disable)}; {prefill_pipeline()}"
        return fingerprint(model, max_length=self.max_length, pipelines=pipelines, require=str(self.require))


def derive(
    model: nn.Module, request: Request, runner: Callable[[Program], StepFunction], report: CompileReport
) -> tuple[Programs, StepFunction]:
    """The programs "step" and "prefill" of a model, and what runs the step, as `runner` made it: compared with the
    model in any case but ``check="off"``.
    """
    with report.stage("cache"):
        key = request.key(model)
        programs = load_programs(key, model) if key is not None else None
    if programs is not None and key is not None:
        run = runner(programs["step"])
        with report.stage("check"):
            agrees = confirm(model, programs["step"], run, request.capacity)
        if agrees:
            report.notices.append("programs from the cache: captured, derived and checked by an earlier process")
            return programs, run
        # Something has changed that the key does not see.
        log.warning("the cached programs of %s do not compute what it does now; derived anew", type(model).__name__)
        forget_programs(key)
    return _derive_anew(model, request, runner, report, key)


def _derive_anew(
    model: nn.Module,
    request: Request,
    runner: Callable[[Program], StepFunction],
    report: CompileReport,
    key: str | None,
) -> tuple[Programs, StepFunction]:
    with report.stage("capture"):
        forward = capture(model, max_length=request.max_length)
    with report.stage("passes"):
        pipeline = step_pipeline(request.passes, request.disable)
        verify: Any = example_inputs if request.verify else None
        step = pipeline.run(forward, require=request.require, verify=verify)
        if "lengths" not in step.inputs:
            raise PassError(
                "the passes make no step of the forward",
                where=str(pipeline),
                remedy="Do not disable derive_step: a decoder needs it.",
            )
        programs = {"step": step, "prefill": prefill_pipeline().run(step)}
        folded = sorted(folded_parameters(programs, forward))
        step.facts["folded"] = folded
    run = runner(step)
    if request.check != "off":
        length = CHECK_LENGTH[request.check]
        with report.stage("check"):
            report.modes = check_step(forward, step, run, length=length, capacity=request.capacity)
        if key is not None:
            with report.stage("cache"):
                store_programs(key, programs, model, folded)
    return programs, run
