"""Names of weights by pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

from accelc.ir.errors import OptionValueError


def selected(names: Collection[str], include: str, exclude: str, *, where: str = "") -> list[str]:
    """The names that a pattern of `include` matches and none of `exclude`, in their order; patterns are separated by
    commas. Raises OptionValueError for one that matches nothing.
    """
    wanted, unwanted = (
        {name for pattern in patterns.split(",") if pattern.strip() for name in matching(pattern, names, where=where)}
        for patterns in (include, exclude)
    )
    return [name for name in names if name in wanted - unwanted]


def matching(pattern: str, names: Collection[str], *, where: str = "") -> list[str]:
    """The names that one pattern (`fnmatch`) matches. Raises OptionValueError for none, unless it is "*"."""
    found = fnmatch.filter(names, pattern.strip())
    if not found and pattern.strip() != "*":
        raise OptionValueError(
            f"the pattern {pattern.strip()!r} matches no weight of a linear or embedding",
            where=where,
            remedy=f"Names are, for example: {', '.join(list(names)[:4])}.",
        )
    return found
