"""State specifications: what a step program keeps between calls (KV caches, running state, drafter tables)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

BATCH, SLOTS = "B", "S"
"""Symbolic entries of a state's shape: the batch size, and the static capacity of its time axis."""


@dataclass(frozen=True)
class StateSpec:
    """One cached tensor. ``shape`` holds ints and the letters B (always at dim 0) and S (time axis, at ``time_dim``).

    A step appends: new token i of row b is written at slot lengths[b] + i (`accelc::cache_update`). Rolling back is
    lowering lengths[b]; committing a tree path is moving rows.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    time_dim: int
    origin: str = field(default="", compare=False)
    """The node of the captured graph whose value is cached."""

    def bytes_per_token(self) -> int:
        """Bytes that one cached token of one row occupies, and that attention reads for it at each step."""
        return prod(d for d in self.shape if isinstance(d, int)) * self.dtype.itemsize

    def sizes(self, batch: int, capacity: int) -> tuple[int, ...]:
        """The concrete shape for `batch` rows of `capacity` slots."""
        symbols = {BATCH: batch, SLOTS: capacity}
        return tuple(symbols[d] if isinstance(d, str) else d for d in self.shape)

    def allocate(self, batch: int, capacity: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """A zeroed tensor of this state (zeros, so that no NaN can leak from unwritten slots)."""
        return torch.zeros(self.sizes(batch, capacity), dtype=self.dtype, device=device)
