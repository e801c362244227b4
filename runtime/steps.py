"""What a decoder runs: the step callables of one model, their states and their limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir.errors import InputError
from accelc.ir.state import StateSpec
from accelc.runtime.speculation.trees import LIMIT

StepFunction = Callable[..., tuple[Tensor, ...]]
"""step(tokens [B, N], positions [B, N], lengths [B], *states) -> (logits [B, N, V], ...), mutating the states."""

ALIGNMENT = 64
"""Capacities are multiples of this many slots, so that kernels need no remainder loop along the time axis."""


def cache_capacity(max_length: int, chunk: int) -> int:
    """Slots a cache needs for sequences of `max_length` tokens.

    A row that has ended its prefill is padded while others go on: up to `chunk` slots of padding lie behind its length,
    or the nodes of a tree.
    """
    return -(-(max_length + max(chunk, LIMIT)) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class TreeSteps:
    """What speculation runs.

    * ``verify``: verify(tokens [B, N], positions [B, N], lengths [B], tree [B, N, W], *states) -> (logits [B, N, V],
      ...), for new tokens that see their ancestors alone; see `accelc.passes.tree_attention`.
    * ``commit``: commit(path [B, K], counts [B], lengths [B], *states) -> (lengths + counts,), which moves the state
      rows of new tokens path[b] to the front of the new ones; see `accelc.passes.commit_path`.
    """

    verify: StepFunction
    commit: StepFunction
    prefill: StepFunction | None = None
    """As the decoder's own, with the further outputs of ``verify``; None where that has none."""


@dataclass(frozen=True)
class Steps:
    """The compiled callables of one model over one set of states.

    * ``decode``: the step for N = 1; ``many``: the step for N in 2..``chunk``.
    * ``prefill`` (optional): as ``many``, called as prefill(tokens, positions, lengths, last [B], *states), and returns
      the logits [B, 1, V] of row last[b] alone, so that a prefill does not compute logits that nobody reads.
    * ``states``: one spec per state argument, in order; ``capacity``: the slots S of their time axis.
    * ``max_length``: tokens a sequence may have, prompt included. Positions never reach it, in padding neither.
    """

    decode: StepFunction
    many: StepFunction
    states: tuple[StateSpec, ...]
    max_length: int
    chunk: int
    capacity: int
    device: torch.device
    prefill: StepFunction | None = None
    trees: Callable[[tuple[object, ...]], TreeSteps] | None = None
    """Makes what speculation runs, when it is first asked for; None where the decoder has none. It is given passes that
    add outputs to the step (`accelc.passes.Pass`)."""

    def __post_init__(self) -> None:
        if self.max_length < 1 or self.chunk < 1:
            raise InputError(f"max_length {self.max_length} and chunk {self.chunk} must be at least 1")
        if self.capacity < self.max_length + self.chunk:
            raise InputError(
                f"capacity {self.capacity} is below max_length {self.max_length} + chunk {self.chunk}",
                remedy="Take the capacity from accelc.runtime.cache_capacity(max_length, chunk).",
            )

    def allocate(self, batch: int) -> tuple[Tensor, ...]:
        """Zeroed states for `batch` rows: ordinary tensors, whatever grad or inference mode the caller is in."""
        with torch.inference_mode(False):
            return tuple(spec.allocate(batch, self.capacity, self.device) for spec in self.states)
