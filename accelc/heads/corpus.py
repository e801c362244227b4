"""Texts to train heads on: files, or what the model itself says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelc.ir.errors import InputError
from accelc.runtime import Decoder, SamplingParams
from accelc.runtime.text import encode
from accelc.texts import read_text

PROMPT = 32
"""Tokens of a text that the model is given to go on from."""


def read_documents(paths: Sequence[Path], key: str = "text") -> list[str]:
    """The texts of files: a ``.jsonl`` file holds one an object, under `key`; any other file is one text.

    Raises InputError, which names the file and line.
    """
    documents: list[str] = []
    for path in paths:
        content = read_text(path)
        if path.suffix != ".jsonl":
            documents.append(content)
            continue
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)[key]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"no object with {key!r}: {type(error).__name__}: {error}",
                    where=f"{path}, line {number}",
                    remedy="Give one JSON object a line; --text-key names the field.",
                ) from error
            if not isinstance(document, str):
                raise InputError(f"{key!r} holds {type(document).__name__}, not a text", where=f"{path}, line {number}")
            documents.append(document)
    return [text for text in documents if text]


def windows_of(tokenizer: Any, documents: Sequence[str], length: int) -> Tensor:
    """The texts, joined by the end-of-text token where there is one, in windows [M, length] of token ids.

    Raises InputError where they do not fill one.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for text in documents:
        ids += [*encode(tokenizer, text), *([end] if isinstance(end, int) else [])]
    if len(ids) < length:
        raise InputError(
            f"{len(ids)} tokens of training text do not fill one window of {length}",
            remedy="Give more text, or a smaller window.",
        )
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)


def own_samples(
    decoder: Decoder,
    windows: Tensor,
    *,
    temperature: float,
    seed: int,
    rows: int,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Windows [M, T] whose first tokens stay and whose others the model says itself (self-distillation)."""
    length, begin = windows.shape[1], min(PROMPT, windows.shape[1] // 2)
    sampling = SamplingParams(temperature=temperature)
    said = []
    for index, batch in enumerate(windows.split(rows)):
        result = decoder.generate(
            batch[:, :begin],
            max_new_tokens=length - begin,
            sampling=sampling,
            seed=seed + index * rows,
            ignore_eos=True,
        )
        said.append(torch.cat([batch[:, :begin], torch.stack(list(result.tokens))], dim=1))
        if progress is not None:
            progress(min((index + 1) * rows, len(windows)), len(windows))
    return torch.cat(said)


def digest_of(windows: Tensor) -> str:
    """Tells data apart."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()[:16]
