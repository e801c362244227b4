"""When a row ends, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral

from accelc.ir.errors import StopError


class FinishReason(StrEnum):
    """Why a row ended. The ending token is part of the output, as in transformers."""

    EOS = "eos"
    """An end-of-sequence token of the model."""
    STOP_TOKEN = "stop_token"
    """A stop token of the call."""
    STOP_STRING = "stop_string"
    """The text contains a stop string; it is cut before it, while the tokens reach through it."""
    LENGTH = "length"
    """max_new_tokens, or max_length where that was not given."""
    CANCELLED = "cancelled"
    """The consumer closed the stream first."""


@dataclass(frozen=True)
class Stops:
    """Stop conditions of one call. At one token, eos comes before stop tokens, stop strings and the length.

    ``max_new_tokens`` counts the ending token; None goes on to the decoder's max_length. ``strings`` are searched in
    the generated text (not in the prompt), across token boundaries. Raises `StopError`.
    """

    max_new_tokens: int | None = None
    eos: frozenset[int] = frozenset()
    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = self.max_new_tokens
        if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n <= 0):
            raise StopError(f"max_new_tokens is {n!r}", remedy="Give an integer of at least 1.")
        for token in (*self.eos, *self.tokens):
            if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
                raise StopError(f"stop token {token!r}", remedy="Stop tokens are ids, integers >= 0.")
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise StopError(f"stop string {string!r}", remedy="Stop strings are texts of at least one character.")
