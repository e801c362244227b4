"""Drafters and acceptance rules by name: the built-in ones, those that were registered, and those of other installed
packages, which declare theirs under the entry-point groups ``accelc.drafters`` and ``accelc.acceptance``; see
`accelc.ir.registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelc.ir.errors import DraftError
from accelc.ir.registry import Failures, Registry

Thing = TypeVar("Thing")
FAILURES = Failures(DraftError, DraftError, DraftError)


def registry_of(base: Callable[..., Thing], what: str, group: str) -> Registry[Thing]:
    """An empty registry of subclasses of `base`; built-in ones are one file each of this folder."""
    return Registry(base, (what, f"{what}s"), group, "accelc.runtime.speculation", FAILURES)


def made(registry: Registry[Thing], given: object) -> Thing:
    """An object from its name, with its default options, or itself. Raises `DraftError`, which lists the known."""
    if isinstance(given, registry.base):
        return given  # type: ignore[no-any-return]
    if isinstance(given, type) and issubclass(given, registry.base):
        raise DraftError(
            f"{given.__name__} is a class", remedy=f"Make one of it: {given.__name__}(...), or give its name."
        )
    cls = registry.find(given)
    try:
        return cls()
    except TypeError as error:
        raise DraftError(
            f"the {registry.what} {given!r} has no defaults: {error}", remedy=f"Pass {cls.__name__}(...) itself."
        ) from error
