"""Passes by name: the built-in ones, those registered by `@register_pass`, and those of other installed packages.

Another package declares its passes under the entry-point group ``accelc.passes``, each under the name of the pass:

    [project.entry-points."accelc.passes"]
    "acme.skip" = "acme.passes:Skip"

Nothing is imported until it is asked for by name, so a broken package disturbs only those who use it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import accelc.passes
from accelc.ir.errors import (
    DuplicatePassError,
    OptionValueError,
    PassError,
    PassPluginError,
    UnknownOptionError,
    UnknownPassError,
)
from accelc.passes.base import Pass

GROUP = "accelc.passes"
PassClass = TypeVar("PassClass", bound=type[Pass])

_registered: dict[str, type[Pass]] = {}


def register_pass(cls: PassClass) -> PassClass:
    """Class decorator: make the pass known by its name. Goes above ``@dataclass(frozen=True)``.

    Raises `DuplicatePassError` when another class has the name, `PassError` when `cls` is not a frozen dataclass.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PassError(
            f"{cls!r} is not a subclass of Pass", remedy="Register classes derived from accelc.passes.Pass."
        )
    if "__dataclass_params__" not in vars(cls):
        raise PassError(
            f"{cls.__qualname__} is not a dataclass of its own, so its options would be lost",
            remedy="Write @register_pass above @dataclass(frozen=True).",
        )
    present = _registered.get(cls.name)
    # A module that is reloaded defines its class anew; that is not a second pass.
    if present is not None and _place(present) != _place(cls):
        raise DuplicatePassError(f"two passes are named {cls.name!r}", where=f"{_place(present)} and {_place(cls)}")
    _registered[cls.name] = cls
    return cls


def known_passes() -> tuple[str, ...]:
    """The names of all passes, sorted; those of other packages are listed without importing them."""
    _import_builtin()
    return tuple(sorted({*_registered, *_plugins()}))


def find_pass(name: str) -> type[Pass]:
    """The class of a pass. Raises `UnknownPassError` (lists the known), `DuplicatePassError`, `PassPluginError`."""
    _import_builtin()
    plugin = _plugins().get(name)
    if plugin is not None:
        return _load(name, plugin)
    if name not in _registered:
        raise UnknownPassError(f"no pass is named {name!r}", remedy=f"Known passes: {', '.join(known_passes())}.")
    return _registered[name]


def build_pass(name: str, options: Mapping[str, object] | None = None) -> Pass:
    """A pass from its name and its options.

    Raises `UnknownPassError`; `UnknownOptionError`, which lists all unknown options and the known ones;
    `OptionValueError` for a missing option or a value of another type than the field's.
    """
    cls, options = find_pass(name), dict(options or {})
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(options.keys() - fields.keys())
    if unknown:
        known = ", ".join(fields) or "none"
        raise UnknownOptionError(f"pass {name!r} has no option {', '.join(unknown)}", remedy=f"Known options: {known}.")
    missing = [
        n
        for n, f in fields.items()
        if n not in options and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OptionValueError(f"pass {name!r} needs the option {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    wrong = [f"{n}={v!r} (wants {fields[n].type})" for n, v in options.items() if not _fits(v, hints[n])]
    if wrong:
        raise OptionValueError(f"pass {name!r} got {', '.join(wrong)}")
    return cls(**options)


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _import_builtin() -> None:
    """Import every module of accelc.passes: one file, one pass, so the folder is the list."""
    for module in pkgutil.iter_modules(accelc.passes.__path__):
        importlib.import_module(f"accelc.passes.{module.name}")


@functools.cache
def _plugins() -> dict[str, EntryPoint]:
    """Entry points by pass name; reads package metadata only."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found and point.value != found[point.name].value:
            raise DuplicatePassError(
                f"two packages provide a pass named {point.name!r}",
                where=f"{_distribution(found[point.name])} and {_distribution(point)}",
            )
        found[point.name] = point
    return found


def _load(name: str, point: EntryPoint) -> type[Pass]:
    where = f"entry point {name} = {point.value} of {_distribution(point)}"
    before = _registered.get(name)
    try:
        cls = point.load()
    except DuplicatePassError:
        raise
    except Exception as error:  # importing another package can raise anything; it is chained
        raise PassPluginError(f"pass {name!r} cannot be imported: {error}", where=where) from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PassPluginError(f"pass {name!r} is not a subclass of accelc.passes.Pass but {cls!r}", where=where)
    if cls.name != name:
        raise PassPluginError(f"the entry point is named {name!r} but the pass {cls.name!r}", where=where)
    if before is not None and before is not cls:
        raise DuplicatePassError(f"two passes are named {name!r}", where=f"{_place(before)} and {where}")
    return register_pass(cls)


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def _fits(value: object, hint: Any) -> bool:
    """Whether `value` may stand in a field of type `hint`; containers are checked by their outer type only."""
    origin = typing.get_origin(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    outer = origin or hint
    if outer is None or outer is type(None):
        return value is None
    if not isinstance(outer, type):
        return True
    if isinstance(value, bool):  # bool is a subclass of int, but True is not a number of layers
        return outer in (bool, object)
    return isinstance(value, (int, float) if outer is float else outer)
