"""Streaming: a generation as an iterator of events, and streamers that a call drives."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor

from accelc.ir.errors import CopyError, StreamerError
from accelc.runtime.generation import Generation, Row
from accelc.runtime.result import GenerateResult, TokenEvent


class TokenStreamer(Protocol):
    """As in transformers: `put` gets the prompts [B, T] once, then the new tokens [B] of each step; `end` closes."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


Streamer: TypeAlias = TokenStreamer | Callable[[TokenEvent], object]
"""A transformers streamer, or a function that is called with every event."""


class Stream:
    """Iterate for one `TokenEvent` per new token; the rows of a step come in order.

    Each step runs when its first event is asked for, and other calls of the decoder may run in between. Closing (or
    leaving the `with` block, or dropping the stream) ends the generation and frees its states; ``result`` then counts
    unfinished rows as cancelled.
    """

    def __init__(self, generation: Generation, lock: threading.RLock) -> None:
        self._generation, self._lock = generation, lock
        self._steps = generation.run()
        self._events: list[TokenEvent] = []
        self._open = True

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __next__(self) -> TokenEvent:
        while not self._events:
            if not self._open:
                raise StopIteration
            self._advance()
        return self._events.pop()

    def _advance(self) -> None:
        try:
            with self._lock, torch.inference_mode():
                rows = next(self._steps, None)
        except BaseException:  # KeyboardInterrupt as well: the states may hold anything now
            self._close(discard=True)
            raise
        if rows is None:
            self._close()
        else:
            self._events = [row.event() for row in reversed(rows)]

    def _close(self, *, discard: bool = False) -> None:
        if self._open:
            self._open = False
            self._steps.close()
            self._generation.session.close(discard=discard)

    def close(self) -> None:
        """End the generation here; harmless when it has ended. Events not yet taken are dropped."""
        self._events = []
        self._close()

    @property
    def result(self) -> GenerateResult:
        """The tokens so far as a result; closes the stream."""
        self.close()
        return self._generation.result()

    def __reduce__(self) -> NoReturn:
        raise CopyError("a Stream cannot be copied or pickled: it is a generation in progress")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._close()


class StreamerGuard:
    """Calls a streamer; whatever it raises becomes a `StreamerError` with the original as its cause."""

    def __init__(self, streamer: Streamer, prompts: Sequence[Tensor], pad_id: int) -> None:
        self._streamer = streamer
        self._pad_id = pad_id
        self._waiting: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self._puts = hasattr(streamer, "put") and hasattr(streamer, "end")
        if not self._puts and not callable(streamer):
            raise StreamerError(
                f"{type(streamer).__name__} is no streamer",
                remedy="Pass a function of one event, or an object with put and end.",
            )
        if self._puts:
            left = torch.nn.utils.rnn.pad_sequence(
                list(prompts), batch_first=True, padding_value=pad_id, padding_side="left"
            )
            call_streamer(streamer.put, left)  # type: ignore[union-attr]

    def step(self, rows: Sequence[Row]) -> None:
        """Report the rows that took a token. `put` gets one of each row, the pad id of rows that have ended: where a
        step gives rows different numbers of tokens, those of a row that is ahead wait.
        """
        if not self._puts:
            for row in rows:
                call_streamer(self._streamer, row.event())  # type: ignore[arg-type]
            return
        for row in rows:
            self._waiting[row.index].append(row.tokens[-1])
            self._ended[row.index] = row.finish is not None
        while any(self._waiting) and all(map(operator.or_, map(bool, self._waiting), self._ended)):
            tokens = [waiting.pop(0) if waiting else self._pad_id for waiting in self._waiting]
            call_streamer(self._streamer.put, torch.tensor(tokens))  # type: ignore[union-attr]

    def end(self) -> None:
        """Report the end of a generation that ran to its end."""
        if self._puts:
            call_streamer(self._streamer.end)  # type: ignore[union-attr]


def call_streamer(function: Callable[..., object], *args: object) -> None:
    """Call a part of a streamer; what it raises is chained to a `StreamerError`."""
    try:
        function(*args)
    except Exception as error:
        raise StreamerError(f"the streamer raised {type(error).__name__}: {error}") from error
