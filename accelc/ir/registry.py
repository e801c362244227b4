"""Classes by name: the built-in ones, those that were registered, those of other installed packages.

A package declares its own under the registry's entry-point group, each under its name:

    [project.entry-points."accelc.passes"]
    "acme.skip" = "acme.passes:Skip"

Nothing of another package is imported until it is asked for by name, so a broken one disturbs only those who use it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from accelc.ir.errors import AccelcError

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Failures:
    """What a registry raises."""

    unknown: type[AccelcError]
    duplicate: type[AccelcError]
    """Two classes claim one name."""
    plugin: type[AccelcError]
    """An entry point cannot be loaded, or is something else; a class lacks something."""


class Registry(Generic[Thing]):
    """Subclasses of ``base`` by their ``name``; ``what`` they are, one and several, in words; ``folder``: the package
    whose modules are the built-in ones, one each.
    """

    def __init__(
        self, base: Callable[..., Thing], what: tuple[str, str], group: str, folder: str, failures: Failures
    ) -> None:
        self.base: Any = base  # a class, and an abstract one
        self.what, self._several = what
        self._group, self._folder, self._failures = group, folder, failures
        self._known: dict[str, type[Thing]] = {}
        self._required = _declared(base)
        self.plugins = functools.cache(self._plugins)
        """Entry points by name; reads package metadata only."""
        self._import_builtin = functools.cache(self._import_folder)

    def add(self, cls: type[Thing]) -> None:
        """Make a class known. Raises where another has its name, or where it does not say what its base asks for."""
        if missing := [name for name in self._required if not hasattr(cls, name)]:
            raise self._failures.plugin(
                f"the {self.what} {cls.__qualname__} has no {' and no '.join(missing)}",
                where=_place(cls),
                remedy=f"Set class attributes: {', '.join(self._required)}; see {_place(self.base)}.",
            )
        name = cls.name  # type: ignore[attr-defined]
        present = self._known.get(name)
        # A module that is reloaded defines its class anew; that is not a second one.
        if present is not None and _place(present) != _place(cls):
            raise self._twice(name, f"{_place(present)} and {_place(cls)}")
        self._known[name] = cls

    def names(self) -> tuple[str, ...]:
        """All names, sorted; those of other packages without importing them."""
        self._import_builtin()
        return tuple(sorted({*self._known, *self.plugins()}))

    def find(self, name: object) -> type[Thing]:
        """The class of a name. Raises where it is unknown (lists the known), there twice, or cannot be loaded."""
        self._import_builtin()
        if not isinstance(name, str) or name not in {*self._known, *self.plugins()}:
            near = difflib.get_close_matches(str(name), self.names(), n=1)
            meant = f"Did you mean {near[0]!r}? " if near else ""
            raise self._failures.unknown(
                f"no {self.what} is named {name!r}", remedy=f"{meant}Known: {', '.join(self.names())}."
            )
        if (plugin := self.plugins().get(name)) is not None:
            self._load(name, plugin)
        return self._known[name]

    def _twice(self, name: str, where: str) -> AccelcError:
        return self._failures.duplicate(f"two {self._several} are named {name!r}", where=where)

    def _import_folder(self) -> None:
        for module in pkgutil.iter_modules(importlib.import_module(self._folder).__path__):
            importlib.import_module(f"{self._folder}.{module.name}")

    def _plugins(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self._group):
            if point.name in found and point.value != found[point.name].value:
                raise self._twice(point.name, f"{_distribution(found[point.name])} and {_distribution(point)}")
            found[point.name] = point
        return found

    def _load(self, name: str, point: EntryPoint) -> None:
        where = f"entry point {name} = {point.value} of {_distribution(point)}"
        before = self._known.get(name)
        try:
            cls = point.load()
        except self._failures.duplicate:
            raise
        except Exception as error:  # importing another package can raise anything; it is chained
            raise self._failures.plugin(f"the {self.what} {name!r} cannot be imported: {error}", where=where) from error
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise self._failures.plugin(
                f"the {self.what} {name!r} is not a subclass of {self.base.__name__} but {cls!r}", where=where
            )
        own = cls.name  # type: ignore[attr-defined]
        if own != name:
            raise self._failures.plugin(f"the entry point is named {name!r} but the {self.what} {own!r}", where=where)
        if before is not None and before is not cls:
            raise self._twice(name, f"{_place(before)} and {where}")
        self.add(cls)


def _declared(base: Any) -> list[str]:
    """Names of the class attributes that a base class declares and leaves to its subclasses."""
    declared = inspect.get_annotations(base)
    return [name for name, kind in declared.items() if str(kind).startswith("ClassVar") and not hasattr(base, name)]


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
