"""Codes that lie several in a 32-bit word."""

from __future__ import annotations

import torch
from torch import Tensor


def fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned fields of `bits` (4 or 8) in int32 words [..., W], lowest first: uint8 [..., W, 32 / bits].

    Files hold words with the low byte first, and so does the memory of the processors that torch runs on.
    """
    own = words.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps odd strides of dims of size one
    octets = own.view(torch.uint8).unflatten(-1, (-1, 4))  # [..., W, 4]
    if bits == 8:
        return octets
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)
