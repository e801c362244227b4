"""Reads prompts in the shapes people hold them, and refuses bad ones before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from accelc.ir.errors import (
    BatchSizeError,
    DTypeError,
    EmptyBatchError,
    EmptyPromptError,
    InputError,
    MaskError,
    PromptTooLongError,
    RankError,
    TokenRangeError,
)

Array: TypeAlias = Tensor | np.ndarray[Any, Any]
Prompt: TypeAlias = Array | Sequence[int] | Sequence[Sequence[int]] | Sequence[Array] | Mapping[str, Any]
"""[T] or [B, T] integer tensor or array, a list of ids, a list of prompts (lists, [T] tensors or arrays) of different
lengths, or what a transformers tokenizer returns: ``input_ids`` with their ``attention_mask``."""

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint16)
"""Dtypes of ids; those of one byte are bytes or masks more often than ids."""
ANNOTATIONS = ("token_type_ids", "special_tokens_mask", "offset_mapping", "length")
"""What tokenizers return besides, which does not change what a decoder computes."""


def read_prompts(prompt: Prompt, *, vocab_size: int, max_length: int, max_batch: int | None = None) -> list[Tensor]:
    """One int64 [T] tensor on the CPU per row, without padding.

    Raises `DTypeError`, `RankError`, `MaskError`, `EmptyBatchError`, `EmptyPromptError`, `TokenRangeError`,
    `BatchSizeError`, and `PromptTooLongError` where a prompt leaves no room for one new token within `max_length`.
    """
    rows = split_rows(prompt)
    if not rows:
        raise EmptyBatchError("the batch has no rows")
    if max_batch is not None and len(rows) > max_batch:
        raise BatchSizeError(
            f"{len(rows)} rows, but the decoder was built for at most {max_batch}",
            remedy="Split the batch, or compile with a larger max_batch.",
        )
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
    """The rows of a prompt as int64 CPU tensors [T], without padding; checks rank, dtype and mask only."""
    if isinstance(prompt, Mapping):
        return _encoding(prompt)
    if isinstance(prompt, np.ndarray):
        prompt = _tensor(prompt)
    if isinstance(prompt, Tensor) and prompt.is_nested:
        prompt = list(prompt.unbind())
    if isinstance(prompt, Tensor):
        if prompt.dim() not in (1, 2):
            raise RankError(f"token ids of shape {list(prompt.shape)}")
        ids = _integers(prompt)
        return [ids] if ids.dim() == 1 else list(ids)
    if isinstance(prompt, str | bytes):
        raise DTypeError("the prompt is text", remedy="Tokenize it first: generate(tokenizer(text), ...).")
    if not isinstance(prompt, Sequence):
        raise RankError(f"cannot read a prompt from {type(prompt).__name__}")
    nested = [_is_row(item) for item in prompt]
    if prompt and all(nested):
        return [_row(item, index) for index, item in enumerate(prompt)]
    if any(nested):
        raise RankError("the prompt mixes ids and lists of ids")
    return [_row(prompt, 0)] if prompt else []


def _encoding(encoding: Mapping[str, Any]) -> list[Tensor]:
    """The rows of what a tokenizer returns, as its mask tells them from padding."""
    foreign = sorted(set(encoding) - {"input_ids", "attention_mask", *ANNOTATIONS})
    if "input_ids" not in encoding or foreign:
        raise InputError(
            f"a prompt with the keys {', '.join(map(str, encoding))}",
            remedy="Give input_ids and, where they are padded, attention_mask; the decoder computes from nothing else.",
        )
    rows, mask = split_rows(encoding["input_ids"]), encoding.get("attention_mask")
    if mask is None:
        return rows
    masks = _mask_rows(mask)
    if [m.shape for m in masks] != [row.shape for row in rows]:
        shapes = [[list(t.shape) for t in side] for side in (masks, rows)]
        raise MaskError(f"the rows of attention_mask have the shapes {shapes[0]}, those of input_ids {shapes[1]}")
    return [_unpad(row, m, f"row {index}") for index, (row, m) in enumerate(zip(rows, masks))]


def _mask_rows(mask: object) -> list[Tensor]:
    """An attention mask, in any of the forms that prompts have, as one tensor [T] per row."""
    try:
        if isinstance(mask, Sequence) and any(map(_is_row, mask)):
            return [torch.as_tensor(row) for row in mask]
        whole = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MaskError(f"attention_mask is {type(mask).__name__} and no mask: {error}") from error
    return list(whole) if whole.dim() == 2 else [whole]


def _unpad(row: Tensor, mask: Tensor, where: str) -> Tensor:
    """The tokens [n] of a row [T] where the mask [T] is 1. Raises `MaskError` unless they stand together."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise MaskError("attention_mask holds other values than 0 and 1", where=where)
    kept = torch.nonzero(mask).flatten().tolist()
    if kept and len(kept) != kept[-1] - kept[0] + 1:
        hole = next(i for i in range(kept[0], kept[-1]) if not mask[i])
        raise MaskError(f"attention_mask has a hole: 0 at position {hole} between tokens", where=where)
    return row[kept[0] : kept[-1] + 1] if kept else row[:0]


def _is_row(item: object) -> bool:
    return isinstance(item, Tensor | Sequence | np.ndarray) and not isinstance(item, str | bytes)


def _row(item: object, index: int) -> Tensor:
    where = f"row {index}"
    if isinstance(item, np.ndarray):
        item = _tensor(item, where)
    if isinstance(item, Tensor):
        if item.dim() != 1:
            raise RankError(f"token ids of shape {list(item.shape)} inside a list", where=where)
        return _integers(item, where)
    assert isinstance(item, Sequence)
    for value in item:
        if _is_row(value):
            raise RankError("lists nested more than two deep", where=where)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise DTypeError(f"token id {value!r} is {type(value).__name__}", where=where)
        if not -(2**63) <= int(value) < 2**63:
            raise TokenRangeError(f"token id {value} does not fit 64 bits", where=where)
    return torch.tensor([int(value) for value in item], dtype=torch.int64)


def _tensor(array: np.ndarray[Any, Any], where: str = "") -> Tensor:
    """An array of ids as an int64 tensor; arrays of 32 or 64 unsigned bits, which torch hardly knows, as well."""
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 2:
        raise DTypeError(f"token ids of dtype {array.dtype}", where=where)
    if array.size and int(array.max()) >= 2**63:
        raise TokenRangeError(f"token id {array.max()} does not fit 64 bits", where=where)
    return torch.from_numpy(array.astype(np.int64))


def _integers(ids: Tensor, where: str = "") -> Tensor:
    if ids.dtype not in ID_DTYPES:
        raise DTypeError(f"token ids of dtype {ids.dtype}", where=where)
    if ids.layout is not torch.strided:
        raise InputError(f"token ids of layout {ids.layout}", where=where, remedy="Pass ids.to_dense().")
    if ids.is_meta:
        raise InputError("token ids on the meta device have no values", where=where, remedy="Give the ids themselves.")
    return ids.detach().to("cpu", torch.int64)
