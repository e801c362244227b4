"""What a generation gives back: tokens, texts, finish reasons, statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from accelc.ir.errors import InputError
from accelc.runtime.arguments import is_integer
from accelc.runtime.speculation.statistics import SpeculationStatistics
from accelc.runtime.stopping import FinishReason


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of one row. ``text`` is what became certain with it: often empty, or of earlier tokens."""

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None
    """Set on the row's last event."""


@dataclass(frozen=True)
class Statistics:
    """Measured on the host, in seconds; the time that a stream's consumer takes, or compiling, is not counted."""

    prompt_tokens: int
    new_tokens: int
    steps: int
    """Decode steps, the prefill not counted; each runs all rows."""
    prefill_seconds: float
    first_token_seconds: float
    """From the call to the first token chosen."""
    total_seconds: float
    batch: int
    compile_seconds: float = 0.0
    """What was compiled in the call, because its sizes or its drafter came up first."""
    speculation: SpeculationStatistics | None = None
    """Where a drafter took part."""

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first of each row, over the time after the first; nan without one."""
        seconds = self.total_seconds - self.first_token_seconds
        return (self.new_tokens - self.batch) / seconds if self.steps and seconds > 0 else float("nan")

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over prefill time."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else float("nan")

    def __str__(self) -> str:
        prefill, decode = self.prefill_tokens_per_second, self.decode_tokens_per_second
        return (
            f"prompt {self.prompt_tokens} tokens, prefill {self.prefill_seconds * 1e3:.1f} ms"
            + ("" if math.isnan(prefill) else f" ({prefill:.0f} tok/s)")
            + f", first token {self.first_token_seconds * 1e3:.1f} ms\n"
            f"new {self.new_tokens} tokens in {self.steps} steps, {self.total_seconds * 1e3:.1f} ms"
            + ("" if math.isnan(decode) else f" ({decode:.1f} tok/s decoding)")
            + (f", {self.compile_seconds:.1f} s compiling" if self.compile_seconds >= 0.1 else "")
            + ("" if self.speculation is None else f"\n{self.speculation}")
        )


@dataclass(frozen=True)
class GenerateResult:
    """The outcome of one call, row by row in the order of the prompts."""

    prompts: list[Tensor]
    """int64 [T_b] each."""
    tokens: list[Tensor]
    """The new tokens, int64 [n_b] each, the ending token included."""
    finish_reasons: list[FinishReason]
    texts: list[str] | None
    """The new text when a tokenizer was given: without the ending eos or stop token, cut before a stop string."""
    seeds: list[int]
    """The seed of each row, also when none was given; the same seeds give the same tokens."""
    statistics: Statistics

    @property
    def sequences(self) -> list[Tensor]:
        """Prompt and new tokens, int64 [T_b + n_b] each."""
        return [torch.cat(pair) for pair in zip(self.prompts, self.tokens)]

    def padded(self, pad_id: int, *, side: Literal["left", "right"] = "right", prompt: bool = True) -> Tensor:
        """All rows as one int64 tensor [B, longest]: sequences, or new tokens alone without ``prompt``."""
        if side not in ("left", "right"):
            raise InputError(f"side is {side!r}", remedy="Use 'left' or 'right'.")
        if not is_integer(pad_id):
            raise InputError(f"pad_id is {pad_id!r}", remedy="Give an integer, such as the tokenizer's pad_token_id.")
        rows = self.sequences if prompt else self.tokens
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)

    def __str__(self) -> str:
        lines = [f"{'row':>4} {'prompt':>7} {'new':>6}  {'finish':<12}" + ("text" if self.texts else "tokens")]
        for row, (prompt, new, reason) in enumerate(zip(self.prompts, self.tokens, self.finish_reasons)):
            shown = repr(self.texts[row]) if self.texts else " ".join(map(str, new.tolist()))
            shown = shown if len(shown) <= 72 else shown[:69] + "..."
            lines.append(f"{row:>4} {len(prompt):>7} {len(new):>6}  {reason.value:<12}{shown}")
        return "\n".join([*lines, str(self.statistics)])
