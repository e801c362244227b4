"""The decoding loop: prefill once, then select, accept, step, until every row has ended."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accelc.ir.errors import NonFiniteLogitsError, TokenRangeError
from accelc.runtime.result import GenerateResult, Statistics, TokenEvent
from accelc.runtime.sampling import SamplingParams
from accelc.runtime.selection import selector
from accelc.runtime.session import Session
from accelc.runtime.stopping import FinishReason, Stops
from accelc.runtime.text import Detokenizer


@dataclass(slots=True)
class Row:
    """One row of a generation as the host sees it."""

    index: int
    budget: int
    """New tokens it may have."""
    stops: Stops
    text: Detokenizer | None
    tokens: list[int] = field(default_factory=list)
    piece: str = ""
    """Text that became certain with the last token."""
    finish: FinishReason | None = None

    def accept(self, token: int) -> bool:
        """Take the next token; True when it is the last. Raises `NonFiniteLogitsError` for the selector's -1."""
        if token < 0:
            raise NonFiniteLogitsError(
                "the model's logits are not finite", where=f"row {self.index}, new token {len(self.tokens)}"
            )
        self.tokens.append(token)
        if token in self.stops.eos:
            self.finish = FinishReason.EOS
        elif token in self.stops.tokens:
            self.finish = FinishReason.STOP_TOKEN
        elif self.text is not None and self._read(token, self.text):
            self.finish = FinishReason.STOP_STRING
        elif len(self.tokens) == self.budget:
            self.finish = FinishReason.LENGTH
        else:
            return False
        self._close()
        return True

    def cancel(self) -> None:
        """End the row where it is, unless it has ended."""
        if self.finish is None:
            self.finish = FinishReason.CANCELLED
            self.piece = ""
            self._close()

    def _read(self, token: int, text: Detokenizer) -> bool:
        self.piece = text.push(token)
        return text.stopped

    def _close(self) -> None:
        if self.text is not None:
            ending = self.finish in (FinishReason.EOS, FinishReason.STOP_TOKEN)
            held = self.text.finish()
            # The ending token has no text of its own: `piece` is still the one of the token before.
            self.piece = held if ending else self.piece + held
            if self.text.stopped and self.finish is FinishReason.LENGTH:
                self.finish = FinishReason.STOP_STRING  # found in text that was waiting for the rest of a character

    def event(self) -> TokenEvent:
        """What happened to the row at the last step."""
        return TokenEvent(self.index, self.tokens[-1], self.piece, self.finish)


@dataclass
class Generation:
    """One call in progress: its session, its rows, its clock."""

    session: Session
    prompts: list[Tensor]
    rows: list[Row]
    params: Sequence[SamplingParams]
    seeds: list[int]
    steps: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0

    def __post_init__(self) -> None:
        compiling = self.session.call.compiling
        self.now, self._compiling, self._compiled = compiling.now, compiling, compiling.seconds

    def run(self) -> Generator[list[Row], None, None]:
        """Yield, after each token, the rows that took one. The caller holds the lock and inference mode."""
        session, active = self.session, self.rows
        begun = self.now()
        logits = session.prefill(self.prompts)  # [B, V]
        most = max(row.budget for row in self.rows)
        select = selector(self.params, self.seeds, self.prompts, logits, session.call, most)
        session.synchronize()
        self.prefill_seconds = self.now() - begun
        retired = False
        readable = self._readable(logits)
        while True:
            tokens = select(logits)
            ended = False
            for row in active:
                if row.accept(tokens[row.index]):
                    ended = True
            self.seconds += self.now() - begun
            if not self.steps:
                self.first_token_seconds = self.seconds
            yield active
            begun = self.now()
            if ended:
                session.retire([row.index for row in active if row.finish is not None])
                active = [row for row in active if row.finish is None]
                retired = True
                if not active:
                    return
            if readable is not None:
                self._require_readable(active, readable)
            if retired:  # what ended rows would have chosen may be -1, or no token that the model reads
                tokens = [0 if row.finish is not None else token for row, token in zip(self.rows, tokens)]
            logits = session.decode(tokens)
            self.steps += 1

    def _readable(self, logits: Tensor) -> int | None:
        """Tokens that the model reads, where it scores more in logits [B, V]; None where it reads all."""
        taken = self.session.input_vocab_size
        return taken if taken is not None and taken < logits.shape[-1] else None

    @staticmethod
    def _require_readable(rows: list[Row], readable: int) -> None:
        """Raise `TokenRangeError` for a last token that the model scores but has no embedding for."""
        for row in rows:
            if row.tokens[-1] >= readable:
                raise TokenRangeError(
                    f"the model chose token {row.tokens[-1]}, and reads tokens below {readable} alone",
                    where=f"row {row.index}, new token {len(row.tokens) - 1}",
                    remedy="Its output layer is wider than its embedding: make them equal, or end rows at such tokens "
                    "(stop_tokens).",
                )

    def result(self) -> GenerateResult:
        """Everything so far; rows that go on count as cancelled."""
        for row in self.rows:
            row.cancel()
        with torch.inference_mode(False):
            tokens = [torch.tensor(row.tokens, dtype=torch.int64) for row in self.rows]
        texts = [row.text.text for row in self.rows if row.text is not None]
        statistics = Statistics(
            prompt_tokens=sum(map(len, self.prompts)),
            new_tokens=sum(map(len, tokens)),
            steps=self.steps,
            prefill_seconds=self.prefill_seconds,
            first_token_seconds=self.first_token_seconds,
            total_seconds=self.seconds,
            compile_seconds=self._compiling.seconds - self._compiled,
            batch=len(self.rows),
        )
        reasons = [row.finish or FinishReason.CANCELLED for row in self.rows]
        return GenerateResult(self.prompts, tokens, reasons, texts or None, self.seeds, statistics)
