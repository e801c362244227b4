"""The tensors of sessions, kept between calls: states, and what a step of one token reads and writes."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from accelc.runtime.functions import bound
from accelc.runtime.graphs import Graphs
from accelc.runtime.steps import Steps

REMEMBERED = 4
"""Sizes of batches whose tensors, and step bound to them, are kept."""


class Workspace:
    """What a session of B rows writes to: the same objects for every session that gets it."""

    def __init__(self, lease: Lease, steps: Steps, graphs: Graphs, batch: int) -> None:
        self.lease, self._steps, self._graphs = lease, steps, graphs
        self.states = tuple(state[:batch] for state in lease.states)
        device = steps.device
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            """Committed tokens of each row, int64 [B]."""
            self.active = torch.ones(batch, dtype=torch.int64, device=device)
            """1 for each row that still generates, else 0: int64 [B]."""
            self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            # The next token's position is the number of those before it.
            self._positions = self.lengths.view(batch, 1)
            # A flat view: what the hot loop writes.
            self._token_row = self._tokens.view(batch)
            # On the host numpy writes the same memory, at a fraction of what a torch operation takes.
            views = self._token_row, self.lengths, self.active
            self._host = tuple(t.numpy() for t in views) if device.type == "cpu" else None
        # What `decode` returned last, [B, 1, V] and [B, V]: often the same memory again.
        self._decoded = self._decoded_rows = torch.empty(0)

    def begin(self) -> Workspace:
        """For a new session: nothing is committed, every row generates."""
        self.lengths.zero_()
        self.active.fill_(1)
        return self

    def decode(self, tokens: Tensor | list[int]) -> Tensor:
        """Append one token per row (int64 [B]) and return the logits [B, V] after it, which the next call overwrites.
        Rows that do not generate are padded.
        """
        if self._host is None:
            self._token_row.copy_(torch.as_tensor(tokens))
            logits = self._run()[0]
        else:
            row, lengths, active = self._host
            row[:] = tokens
            logits = self._run()[0]
            lengths += active
        if logits is not self._decoded:
            self._decoded, self._decoded_rows = logits, logits.select(1, 0)
        return self._decoded_rows

    @functools.cached_property
    def _run(self) -> Callable[[], tuple[Tensor, ...]]:
        """The step of one token; where the host does not count, it counts the token too."""
        step = bound(self._steps.decode, self._tokens, self._positions, self.lengths, *self.states)
        return step if self._host is not None else self._graphs.again(functools.partial(self._counted, step))

    def _counted(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        result = step()
        self.lengths.add_(self.active)
        return result


class Lease:
    """One set of states, and the workspaces that read its first rows."""

    def __init__(self, states: tuple[Tensor, ...]) -> None:
        self.states = states
        self.workspaces: OrderedDict[int, Workspace] = OrderedDict()

    @property
    def rows(self) -> int:
        return self.states[0].shape[0] if self.states else 0


class WorkspacePool:
    """One spare set of states, kept between calls: the largest batch seen so far. Smaller batches use its first rows.

    What is taken belongs to its taker alone, so calls never share states; what may hold NaN is not given back, because
    NaN in an unwritten slot would survive a zero attention weight.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.graphs = Graphs(steps.device)
        self._spare = Lease(())

    def take(self, batch: int) -> Workspace:
        """For a session of `batch` rows."""
        if self._spare.rows >= batch:
            lease, self._spare = self._spare, Lease(())
        else:
            lease = Lease(self._steps.allocate(batch))
        known = lease.workspaces
        if batch not in known:
            known[batch] = Workspace(lease, self._steps, self.graphs, batch)
            if len(known) > REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(batch)
        return known[batch].begin()

    def give(self, workspace: Workspace) -> None:
        """Hand back what `take` gave."""
        if workspace.lease.rows >= self._spare.rows:
            self._spare = workspace.lease
