"""What a pass is: a frozen dataclass whose fields are its options, with a name and one method, `run`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from accelc.ir import Exactness, Program
from accelc.ir.errors import PassError

_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")


@dataclass(frozen=True)
class PassResult:
    """What `Pass.run` returns: the new program, in how many places the pass matched, and notes for the report."""

    program: Program
    matches: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """A program transformation. A subclass is a frozen dataclass too: its fields are the options, all with a default.

    The docstring of a subclass states its contract. ``name``, in lower case with underscores, is the name of its file.
    ``exactness``, ``requires``, ``ensures`` and ``expected_matches`` may be properties where they depend on options.
    """

    name: ClassVar[str]
    """Global over all installed packages; other packages than accelc prefix theirs (``acme.skip``)."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes that must have run before, where they are in the pipeline at all."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of passes that must run later, where they are in the pipeline at all."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Keys of `Program.facts` that must stand when the pass starts; whoever ensures them is ordered before it."""
    ensures: ClassVar[tuple[str, ...]] = ()
    """Keys of `Program.facts` that stand afterwards; those the pass does not store itself are stored as True."""
    exactness: ClassVar[Exactness] = Exactness.EXACT
    """What the pass promises about the function it leaves behind."""
    expected_matches: ClassVar[tuple[int, int | None]] = (1, None)
    """Fewest and most matches (None: no bound). A pass that silently stopped matching is a defect, hence at least 1."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PassError(
                f"the pass {cls.__qualname__} has the name {name!r}",
                where=f"{cls.__module__}.{cls.__qualname__}",
                remedy="Set `name` to lower-case words joined by underscores, optionally prefixed by 'package.'.",
            )

    def run(self, program: Program) -> PassResult:
        """Return the transformed program. `program` itself must stay as it is: work on `program.clone()`."""
        raise NotImplementedError(f"{type(self).__qualname__}.run")

    def options(self) -> dict[str, object]:
        """The options as given: field names to values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"
