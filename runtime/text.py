"""Text of a growing row: incremental detokenization that never splits a character, and stop strings across tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from accelc.ir.errors import InputError, TokenizerError

INCOMPLETE = "\ufffd"
"""What tokenizers print for bytes that are not (yet) a character."""
CONTEXT = 6
"""Prompt tokens that the first text is decoded with: a space or a character may depend on the tokens before it."""

Decode = Callable[[list[int]], str]


class Tokenizer(Protocol):
    """Anything that turns ids into text, such as a transformers tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


def decode_function(tokenizer: Tokenizer | Decode | None) -> Decode | None:
    """The ids -> text function of a tokenizer object or of a plain callable; its failures are `TokenizerError`s."""
    if tokenizer is None:
        return None
    decode = getattr(tokenizer, "decode", tokenizer)
    if not callable(decode):
        raise InputError(
            f"{type(tokenizer).__name__} is no tokenizer", remedy="Pass a callable or an object with .decode(ids)."
        )
    name = getattr(decode, "__qualname__", type(decode).__name__)

    def guarded(ids: list[int]) -> str:
        try:
            text = decode(ids)
        except Exception as error:
            raise TokenizerError(
                f"{name} raised {type(error).__name__}: {error}", where=f"decoding the token ids {ids}"
            ) from error
        if not isinstance(text, str):
            raise TokenizerError(f"{name} returned {text!r} and no text", where=f"decoding the token ids {ids}")
        return text

    return guarded


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text by a transformers tokenizer. Raises `TokenizerError` for whatever it raises."""
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as error:
        raise TokenizerError(
            f"{type(tokenizer).__name__} raised {type(error).__name__}: {error}",
            where=f"encoding the text {text[:60]!r}",
            remedy="Pass text that this tokenizer encodes.",
        ) from error


class Detokenizer:
    """The text of one row, piece by piece; the pieces joined are the continuation of the prompt.

    Bytes of an unfinished character are held back, and text that may be the beginning of a stop string. When a stop
    string appears, the text ends before its first occurrence and ``stopped`` is set.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], strings: Sequence[str] = ()) -> None:
        self._decode, self._strings = decode, tuple(strings)
        self._context = list(prompt[-CONTEXT:])
        self._pending: list[int] = []
        # A character that the prompt leaves unfinished is text of the row that finishes it.
        self._context_text = decode(self._context).rstrip(INCOMPLETE)
        self._held = ""
        self._pieces: list[str] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token and return the text that is now certain (often empty)."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if text.endswith(INCOMPLETE):
            return ""
        return self._emit(self._take(text))

    def finish(self) -> str:
        """The text still held back: call it once, at the row's end."""
        if self.stopped:
            return ""
        fresh = self._take(self._decode(self._context + self._pending)) if self._pending else ""
        piece = self._emit(fresh)
        if not self.stopped:
            piece += self._held
            self._pieces.append(self._held)
        self._held = ""
        return piece

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._pieces)

    def _take(self, text: str) -> str:
        """What ``text`` adds behind the context, which moves up to the pending tokens."""
        fresh = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return fresh

    def _emit(self, fresh: str) -> str:
        held = self._held + fresh
        found = [at for at in (held.find(s) for s in self._strings) if at >= 0]
        if found:
            self.stopped = True
            piece, self._held = held[: min(found)], ""
        else:
            keep = max((_overlap(held, s) for s in self._strings), default=0)
            piece, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self._pieces.append(piece)
        return piece


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``string``."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
