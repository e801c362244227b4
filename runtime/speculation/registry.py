"""Names of drafters and acceptance rules: the built-in ones, those that were registered, those of installed packages.

Another package declares its own under the entry-point groups ``accelc.drafters`` and ``accelc.acceptance``, each under
its name:

    [project.entry-points."accelc.drafters"]
    "acme.lookup" = "acme.drafters:Lookup"
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

import accelc.runtime.speculation
from accelc.ir.errors import DraftError

Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """Classes by their ``name``; ``what`` they are, in words."""

    def __init__(self, base: Callable[..., Thing], what: str, group: str) -> None:
        self._base: Any = base  # a class, and an abstract one
        self._what, self._group = what, group
        self._known: dict[str, type[Thing]] = {}

    def add(self, cls: type[Thing]) -> None:
        """Make a class known. Raises `DraftError` when another one has its name."""
        name = cls.name  # type: ignore[attr-defined]
        present = self._known.get(name)
        # A module that is reloaded defines its class anew; that is not a second one.
        if present is not None and _place(present) != _place(cls):
            raise DraftError(f"two {self._what}s are named {name!r}", where=f"{_place(present)} and {_place(cls)}")
        self._known[name] = cls

    def names(self) -> tuple[str, ...]:
        """All names, sorted; those of other packages without importing them."""
        _import_builtin()
        return tuple(sorted({*self._known, *(point.name for point in entry_points(group=self._group))}))

    def find(self, given: object) -> Thing:
        """An object from its name, with its default options, or itself. Raises `DraftError`, which lists the known."""
        if isinstance(given, self._base):
            return given  # type: ignore[no-any-return]
        _import_builtin()
        if isinstance(given, str) and given not in self._known:
            for point in entry_points(group=self._group, name=given):
                self._load(given, point)
        if not isinstance(given, str) or given not in self._known:
            near = difflib.get_close_matches(str(given), self.names(), n=1)
            meant = f"Did you mean {near[0]!r}? " if near else ""
            raise DraftError(f"no {self._what} is {given!r}", remedy=f"{meant}Known: {', '.join(self.names())}.")
        try:
            return self._known[given]()
        except TypeError as error:
            name = self._known[given].__name__
            raise DraftError(f"the {self._what} {given!r} has no defaults: {error}",
                             remedy=f"Pass {name}(...) itself.") from error  # fmt: skip

    def _load(self, name: str, point: Any) -> None:
        where = f"entry point {name} = {point.value}"
        try:
            cls = point.load()
        except Exception as error:  # importing another package can raise anything; it is chained
            raise DraftError(f"the {self._what} {name!r} cannot be imported: {error}", where=where) from error
        if not (isinstance(cls, type) and issubclass(cls, self._base)) or cls.name != name:  # type: ignore[attr-defined]
            raise DraftError(f"{cls!r} is no {self._what} of the name {name!r}", where=where)
        self.add(cls)


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _import_builtin() -> None:
    """One file, one drafter: the folder is the list."""
    for module in pkgutil.iter_modules(accelc.runtime.speculation.__path__):
        importlib.import_module(f"accelc.runtime.speculation.{module.name}")
