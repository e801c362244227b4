"""Passes by name: the built-in ones, those registered by `@register_pass`, and those of other installed packages, which
declare theirs under the entry-point group ``accelc.passes``; see `accelc.ir.registry`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from accelc.ir.errors import (
    DuplicatePassError,
    OptionValueError,
    PassError,
    PassPluginError,
    UnknownOptionError,
    UnknownPassError,
)
from accelc.ir.registry import Failures, Registry
from accelc.passes.base import Pass

PassClass = TypeVar("PassClass", bound=type[Pass])
PASSES: Registry[Pass] = Registry(
    Pass,
    ("pass", "passes"),
    group="accelc.passes",
    folder="accelc.passes",
    failures=Failures(UnknownPassError, DuplicatePassError, PassPluginError),
)


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
    PASSES.add(cls)
    return cls


def known_passes() -> tuple[str, ...]:
    """The names of all passes, sorted; those of other packages are listed without importing them."""
    return PASSES.names()


def find_pass(name: str) -> type[Pass]:
    """The class of a pass. Raises `UnknownPassError` (lists the known), `DuplicatePassError`, `PassPluginError`."""
    return PASSES.find(name)


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
