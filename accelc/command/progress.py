"""Progress of long work, for people and for logs."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from accelc.command.shared import errors

A_LINE = 30.0
"""Seconds from one line to the next where standard error is no terminal, which shows no bar."""


class Bars:
    """Progress bars on standard error, one for each kind of work that is told of; a log gets a line now and then, and
    one at the end of each kind.
    """

    def __init__(self, *, transient: bool = False) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=errors,
            transient=transient,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last = time.monotonic()

    def __enter__(self) -> Bars:
        if errors.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @property
    def told(self) -> bool:
        """Whether there was any."""
        return bool(self._tasks)

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """So much of some work is done."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note="")
        if errors.is_terminal:
            self._bars.update(self._tasks[what], completed=done, total=total, note=note)
        elif done == total or time.monotonic() - self._last >= A_LINE:
            self._last = time.monotonic()
            errors.print(f"{what}: {done} of {total}" + (f", {note}" if note else ""), markup=False)
