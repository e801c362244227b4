"""Names of weights by pattern."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Collection

from accelc.ir.errors import OptionValueError

log = logging.getLogger(__name__)


def selected(names: Collection[str], include: str, exclude: str, *, where: str = "", needed: bool = True) -> list[str]:
    """The names that a pattern of `include` matches and none of `exclude`, in their order; patterns are separated by
    commas. Raises OptionValueError for one that matches nothing (see `matching`).
    """

    def named(patterns: str) -> set[str]:
        each = filter(str.strip, separated(patterns))
        return {name for pattern in each for name in matching(pattern, names, where=where, needed=needed)}

    wanted = named(include) - named(exclude)
    return [name for name in names if name in wanted]


def separated(patterns: str) -> list[str]:
    """The parts of a text between commas, but for those in brackets."""
    return re.split(r",(?![^\[\]]*\])", patterns)


def exactly(name: str) -> str:
    """The pattern that matches a name alone."""
    return re.sub(r"[*?\[,]", lambda found: f"[{found[0]}]", name)


def matching(pattern: str, names: Collection[str], *, where: str = "", needed: bool = True) -> list[str]:
    """The names that one pattern (`fnmatch`) matches. Raises OptionValueError for none, unless it is "*"; where it is
    not `needed`, because the names are a part of all there are, that is logged as a warning.
    """
    found = fnmatch.filter(names, pattern.strip())
    if found or pattern.strip() == "*":
        return found
    pattern, examples = pattern.strip(), ", ".join(list(names)[:4])
    if needed:
        raise OptionValueError(
            f"the pattern {pattern!r} matches no weight of a linear or embedding",
            where=where,
            remedy=f"Names are, for example: {examples}.",
        )
    log.warning("accelc: the pattern %r matches no weight of a graph, which has %s", pattern, examples or "none")
    return found
