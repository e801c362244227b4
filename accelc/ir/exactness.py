"""Exactness as a type: what a pass, and so a pipeline, promises about the function it computes."""

from __future__ import annotations

from enum import IntEnum


class Exactness(IntEnum):
    """Ordered from weakest to strongest; composing programs or passes takes the minimum.

    * ``LOSSY``: another function; the pass says how its loss is measured.
    * ``DISTRIBUTION``: sampling draws from the same distribution, greedy decoding gives the same tokens.
    * ``EXACT``: the same function up to floating-point rounding.
    """

    LOSSY = 0
    DISTRIBUTION = 1
    EXACT = 2

    def __str__(self) -> str:
        return self.name.lower()

    @staticmethod
    def compose(*parts: Exactness) -> Exactness:
        """The guarantee of doing all `parts` one after another; EXACT when there are none."""
        return min(parts, default=Exactness.EXACT)
