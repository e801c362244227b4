"""Sampling: what a user may ask for; `accelc.ir.sampling` says what that does to scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

from accelc.ir.errors import SamplingError, unknown_options


@dataclass(frozen=True)
class SamplingParams:
    """How one row picks its next token. The default is greedy: the likeliest token, the lowest id on a tie.

    * ``temperature``: 0 is greedy; otherwise scores are divided by it.
    * ``top_k``: keep the k likeliest tokens (and ties with the last of them); 0 keeps all.
    * ``top_p``: keep the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020).
    * ``min_p``: drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024).
    * ``repetition_penalty``: positive scores of tokens in prompt or output are divided by it, negative ones multiplied
      (Keskar et al. 2019); acts on greedy rows too.

    Raises `UnknownOptionError`, and `SamplingError` for values out of range and for filters that greedy decoding would
    ignore.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __new__(cls, *values: float, **options: float) -> SamplingParams:
        known = [f.name for f in fields(cls)]
        if unknown := options.keys() - set(known):
            raise unknown_options("SamplingParams", unknown, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, Real, _is_temperature, "0 (greedy) or a number >= 1e-6")
        _require("top_k", self.top_k, Integral, lambda k: k >= 0, "an integer >= 0 (0 keeps all tokens)")
        _require("top_p", self.top_p, Real, lambda p: 0 < p <= 1, "in (0, 1]")
        _require("min_p", self.min_p, Real, lambda p: 0 <= p < 1, "in [0, 1)")
        _require("repetition_penalty", self.repetition_penalty, Real, lambda p: 0 < p < math.inf, "a number > 0")
        filters = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        if self.greedy and any(filters.values()):
            names = ", ".join(name for name, given in filters.items() if given)
            raise SamplingError(
                f"{names} has no effect on greedy decoding",
                remedy="Set a temperature above 0 (1.0 leaves scores alone).",
            )

    @property
    def greedy(self) -> bool:
        """Whether the row takes the likeliest token and draws nothing."""
        return self.temperature == 0


def _is_temperature(value: float) -> bool:
    return value == 0 or 1e-6 <= value < math.inf  # smaller ones overflow the scores


def _require(name: str, value: object, kind: type, accept, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not accept(value):
        raise SamplingError(f"{name} is {value!r}", remedy=f"{name} must be {wanted}.")
