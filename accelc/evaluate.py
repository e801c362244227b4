"""Perplexity: what a decoder's losses are stated in."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir.errors import InputError
from accelc.ir.token_ids import one_sequence
from accelc.runtime import Decoder
from accelc.runtime.arguments import check_count
from accelc.runtime.prompts import check_range

WINDOW = 1024
"""Longest window that is chosen by itself."""


@dataclass(frozen=True)
class Perplexity:
    """``loss``: mean negative log likelihood in nats a token over ``tokens`` tokens that were scored."""

    loss: float
    tokens: int
    windows: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is no number of 64 bits."""
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} ({self.loss:.5f} nats a token) over {self.tokens} tokens, "
            f"{self.windows} windows of {self.window} with stride {self.stride}"
        )


def perplexity(
    decoder: Decoder,
    ids: Tensor | list[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of a text of token ids [T] by a sliding window.

    Each window of `window` tokens (default: the decoder's max_length, at most 1024) begins `stride` tokens after the
    one before (default: half a window); a token is scored once, in the first window that holds it, so that all but
    those of the first window see at least window - stride tokens before them. `progress(done, all)` is called after
    each window. Raises InputError for what are no token ids of one text, fewer than two, or a window or stride that
    does not fit.
    """
    if not isinstance(decoder, Decoder):
        raise InputError(f"the decoder is a {type(decoder).__name__}", remedy="Give what accelc.compile returns.")
    ids = one_sequence(ids, "the text")
    for name, size in (("window", window), ("stride", stride)):
        if size is not None:
            check_count(name, size)
    longest = decoder.max_length
    window = min(longest, WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= longest:
        raise InputError(f"a window of {window} tokens", remedy=f"Give one from 2 to the decoder's {longest}.")
    if not 1 <= stride < window:
        raise InputError(f"a stride of {stride} for a window of {window}", remedy="Give one below the window.")
    if len(ids) < 2:
        raise InputError(f"a text of {len(ids)} tokens has nothing to predict", remedy="Give a longer text.")
    check_range(ids, decoder.vocab_size, "the text")
    spans = list(_spans(len(ids), window, stride))
    total, count = 0.0, 0
    for index, (begin, end, first) in enumerate(spans):
        total += _negative_log_likelihood(decoder, ids[begin:end], first - begin)
        count += end - first
        if progress is not None:
            progress(index + 1, len(spans))
    return Perplexity(total / count, count, len(spans), window, stride)


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows [begin, end) and the first token in them that is scored there."""
    scored = 1  # nothing predicts the first token
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if end > scored:
            yield begin, end, scored
            scored = end
        if end == length:
            return


def _negative_log_likelihood(decoder: Decoder, ids: Tensor, first: int) -> float:
    """The summed loss in nats of tokens `first` .. of a window, fed in chunks."""
    total = 0.0
    with decoder.start(ids[:1]) as session:
        total += _score(session.logits, ids, 1, first)
        for begin in range(1, len(ids) - 1, decoder.steps.chunk):
            end = min(begin + decoder.steps.chunk, len(ids) - 1)  # the last token predicts nothing that is scored
            total += _score(session.step(ids[None, begin:end])[0], ids, begin + 1, first)
    return total


def _score(logits: Tensor, ids: Tensor, at: int, first: int) -> float:
    """The loss of ids[at], ids[at + 1] ... by logits [N, V], of those from `first` on."""
    skip = max(0, first - at)
    if skip >= len(logits):
        return 0.0
    targets = ids[at + skip : at + len(logits)].to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits[skip:].float(), targets, reduction="sum"))
