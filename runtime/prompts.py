"""Reads prompts in the shapes people hold them, and refuses bad ones before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias

import torch
from torch import Tensor

from accelc.ir.errors import (
    BatchSizeError,
    DTypeError,
    EmptyBatchError,
    EmptyPromptError,
    PromptTooLongError,
    RankError,
    TokenRangeError,
)

Prompt: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]
"""[T] or [B, T] integer tensor, a list of ids, or a list of prompts (lists or [T] tensors) of different lengths."""

ID_DTYPES = (torch.int64, torch.int32)


def read_prompts(prompt: Prompt, *, vocab_size: int, max_length: int, max_batch: int | None = None) -> list[Tensor]:
    """One int64 [T] tensor on the CPU per row.

    Raises `DTypeError`, `RankError`, `EmptyBatchError`, `EmptyPromptError`, `TokenRangeError`, `BatchSizeError`, and
    `PromptTooLongError` where a prompt leaves no room for one new token within `max_length`.
    """
    rows = split_rows(prompt)
    if not rows:
        raise EmptyBatchError("the batch has no rows")
    if max_batch is not None and len(rows) > max_batch:
        raise BatchSizeError(f"{len(rows)} rows, but the decoder was built for at most {max_batch}")
    for index, row in enumerate(rows):
        where = f"row {index}"
        if row.numel() == 0:
            raise EmptyPromptError("the prompt has no tokens", where=where)
        if row.numel() >= max_length:
            raise PromptTooLongError(
                f"a prompt of {row.numel()} tokens leaves no room for a new one in max_length {max_length}", where=where
            )
        check_range(row, vocab_size, where)
    return rows


def check_range(ids: Tensor, vocab_size: int, where: str) -> None:
    """Raise `TokenRangeError` unless every id lies in [0, vocab_size)."""
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        raise TokenRangeError(
            f"token id {low if low < 0 else high} lies outside the vocabulary of {vocab_size}", where=where
        )


def split_rows(prompt: Prompt) -> list[Tensor]:
    """The rows of a prompt as int64 CPU tensors [T]; checks rank and dtype only."""
    if isinstance(prompt, Tensor):
        if prompt.dim() not in (1, 2):
            raise RankError(f"token ids of shape {list(prompt.shape)}")
        ids = _integers(prompt)
        return [ids] if ids.dim() == 1 else list(ids)
    if isinstance(prompt, str | bytes):
        raise DTypeError("the prompt is text", remedy="Tokenize it first and pass the ids.")
    if not isinstance(prompt, Sequence):
        raise RankError(f"cannot read a prompt from {type(prompt).__name__}")
    nested = [isinstance(item, Tensor | Sequence) and not isinstance(item, str | bytes) for item in prompt]
    if prompt and all(nested):
        return [_row(item, index) for index, item in enumerate(prompt)]
    if any(nested):
        raise RankError("the prompt mixes ids and lists of ids")
    return [_row(prompt, 0)] if prompt else []


def _row(item: object, index: int) -> Tensor:
    where = f"row {index}"
    if isinstance(item, Tensor):
        if item.dim() != 1:
            raise RankError(f"token ids of shape {list(item.shape)} inside a list", where=where)
        return _integers(item, where)
    assert isinstance(item, Sequence)
    for value in item:
        if isinstance(value, Tensor | Sequence) and not isinstance(value, str | bytes):
            raise RankError("lists nested more than two deep", where=where)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise DTypeError(f"token id {value!r} is {type(value).__name__}", where=where)
        if not -(2**63) <= int(value) < 2**63:
            raise TokenRangeError(f"token id {value} does not fit 64 bits", where=where)
    return torch.tensor([int(value) for value in item], dtype=torch.int64)


def _integers(ids: Tensor, where: str = "") -> Tensor:
    if ids.dtype not in ID_DTYPES:
        raise DTypeError(f"token ids of dtype {ids.dtype}", where=where)
    return ids.detach().to("cpu", torch.int64)
