"""Token ids of a text, as callers may give them."""

from __future__ import annotations

import torch
from torch import Tensor

from accelc.ir.errors import InputError

REMEDY = "Give the integers that the model's tokenizer makes of a text."


def one_sequence(given: object, what: str) -> Tensor:
    """Ids [T] int64 of a tensor, also [1, T], an array or a list. Raises InputError, in which `what` is named."""
    if isinstance(given, str | bytes):
        raise InputError(f"{what} is a text, not token ids", remedy=REMEDY)
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{what} is of type {type(given).__name__}, which makes no token ids", remedy=REMEDY
        ) from error
    if ids.layout is not torch.strided or ids.is_meta:
        raise InputError(f"{what} is a {ids.layout} tensor on {ids.device}", remedy=REMEDY)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        found = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        raise InputError(f"{what} is {found}", remedy=REMEDY)
    return ids.to(torch.int64)
