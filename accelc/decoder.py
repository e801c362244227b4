"""A decoder together with the programs it runs and what compiling it did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from accelc.codegen import CompiledStep, Report
from accelc.ir import Program
from accelc.passes.check_step import Mode
from accelc.passes.manager import report as passes_table
from accelc.runtime import Decoder
from accelc.runtime.arguments import token_ids
from accelc.runtime.speculation.draft import Setting
from accelc.runtime.steps import StepFunction

log = logging.getLogger(__name__)


@dataclass
class CompileReport:
    """What `accelc.compile` did: seconds by stage, errors of the check, code generation by program, notices.

    ``progress`` is called with the name of each stage as it begins.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    modes: tuple[Mode, ...] = ()
    compiled: dict[str, Report] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    progress: Callable[[str], object] | None = field(default=None, repr=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and add the time of the block to it."""
        if self.progress is not None:
            self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            log.info("%s: %.2f s", name, seconds)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def known_eos(eos: object, vocab_size: int | None, report: CompileReport) -> frozenset[int]:
    """The end-of-sequence ids that the model can produce; the report notes the others, which its configuration names.

    Raises StopError for what is no token id.
    """
    ids = token_ids("eos", eos)
    beyond = sorted(i for i in ids if vocab_size is not None and i >= vocab_size)
    if beyond:
        report.notices.append(f"eos {beyond} lies outside the vocabulary of {vocab_size}: it ends no row")
    return ids.difference(beyond)


class CompiledDecoder(Decoder):
    """A `Decoder` with its ``programs`` (step, prefill) and ``report``; print it, or `show()` it in a terminal."""

    def __init__(
        self,
        programs: dict[str, Program],
        report: CompileReport,
        compile_further: Callable[[Program], StepFunction],
        **options: Any,
    ) -> None:
        options["eos"] = known_eos(options.get("eos"), options.get("vocab_size"), report)
        super().__init__(states=programs["step"].states, **options)
        self.programs = programs
        self.report = report
        self._compile_further = compile_further

    def setting(self) -> Setting:
        """What drafters are bound to, with the step that their graph part reads."""
        return replace(super().setting(), step=self.programs["step"], compile=self._compile_further)

    def settle(self) -> None:
        """Finish now what is otherwise spread over the first hundreds of steps: huge pages under the weights, up to a
        few seconds a gigabyte. For services that want their full speed from the first request on.
        """
        if isinstance(self.steps.decode, CompiledStep):
            self.steps.decode.settle()

    def renderable(self) -> Group:
        """The report as tables for rich: passes, caches, check, seconds."""
        step = self.programs["step"]
        caches = Table(
            title=f"caches: {sum(s.bytes_per_token() for s in step.states)} bytes a token", title_justify="left"
        )
        for column in ("state", "cached value", "shape", "dtype", "bytes a token"):
            caches.add_column(column, overflow="fold")
        for spec in step.states:
            shape, dtype = ", ".join(map(str, spec.shape)), str(spec.dtype).removeprefix("torch.")
            caches.add_row(spec.name, spec.origin, f"[{shape}]".replace("[", r"\["), dtype, str(spec.bytes_per_token()))
        times = Table(title="seconds", title_justify="left")
        for name in self.report.seconds:
            times.add_column(name, justify="right")
        times.add_row(*(f"{s:.2f}" for s in self.report.seconds.values()))
        lines = [f"check: {mode} of the logits' spread" for mode in self.report.modes]
        lines += [f"notice: {text}" for text in self.report.notices]
        for name, report in self.report.compiled.items():
            counts = ", ".join(f"{count} {kind}" for kind, count in report.operations.items())
            lines.append(f"operations of {name}: {counts}")
            lines += [f"notice: {text}" for text in report.notices]
        return Group(passes_table(step), caches, times, *lines)

    def show(self) -> None:
        """Print the report."""
        Console().print(self.renderable())

    def __str__(self) -> str:
        console = Console(width=140, record=True, file=None, no_color=True)
        with console.capture() as captured:
            console.print(self.renderable())
        return captured.get()
