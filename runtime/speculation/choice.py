"""How many nodes of a drafter's tree a step verifies: what gives most tokens a second, by what was measured so far.

A step takes longer the more nodes it has, from where it no longer waits for the memory; a node is worth the share of
steps that accept it. Both are measured while decoding. Sizes that have not been tried are taken for fast until they
have. One node is the root alone: plain decoding, which wins where speculation does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIZES = (1, 3, 6, 12, 24, 48, 96)
"""Sizes that are tried, and the whole tree: each takes a plan of the step's memory when it is first met."""
FIRST = 6
EVERY = 4
"""Steps from one decision to the next."""
PLAIN = 8
"""The same while nothing is drafted."""
STALE = 400
"""Steps after which the time of a size that is not much worse is measured again."""
PATIENCE = 128
"""Plain steps after which drafts are tried again, twice as many the next time: the text may have changed."""

FORGET = 0.98
"""What a step leaves of the weight of those before it, for the nodes that it verified."""
FADE = 0.997
"""The same for others."""
DOUBT = 2.0
"""Steps that the expectation before any step counts for."""
SEEN = 10.0
"""Steps that what was seen of other texts counts for."""


class StepTimes:
    """Seconds of a step by batch and nodes, over all generations of a decoder."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._met: set[tuple[int, int]] = set()

    def add(self, batch: int, nodes: int, seconds: float) -> None:
        """One step. The first of its size does not count: it makes a plan."""
        key = (batch, nodes)
        if key not in self._met:
            self._met.add(key)
            return
        known = self._seconds.get(key)
        if known is None:
            self._seconds[key] = seconds
        else:  # a machine that stumbled says little
            self._seconds[key] = known + (0.3 if seconds < known else 0.1) * (min(seconds, 2 * known) - known)

    def known(self, batch: int, nodes: int) -> float | None:
        return self._seconds.get((batch, nodes))


class Acceptance:
    """How often the nodes of a drafter's trees of `size` nodes were kept, over all generations of a decoder."""

    def __init__(self, size: int) -> None:
        self.met, self.kept = np.zeros(size), np.zeros(size)
        self._expected = np.concatenate([[1.0], 0.5 / np.arange(1, size)])

    def add(self, paths: Sequence[Sequence[int]], nodes: int) -> None:
        """One step of so many nodes: those kept in each row."""
        for counts in (self.met, self.kept):
            counts[:nodes] *= FORGET
            counts[nodes:] *= FADE
        self.met[:nodes] += len(paths)
        for path in paths:
            self.kept[path] += 1

    def fade(self, steps: int) -> None:
        """So many steps without drafts."""
        self.met *= FADE**steps
        self.kept *= FADE**steps

    def doubt(self) -> None:
        """Another text begins: what was seen counts for `SEEN` steps at most."""
        share = min(1.0, SEEN / max(1.0, *self.met[1:]))
        self.met *= share
        self.kept *= share

    def tokens(self) -> np.ndarray:
        """Expected tokens of a row in a step of 1, 2, ... nodes."""
        worth = (self.kept + DOUBT * self._expected) / (self.met + DOUBT)
        seen = self.met >= 1
        if seen[1:].any():  # nodes that were not verified yet promise no more than the best of those that were
            worth[~seen] *= min(1.0, (worth / self._expected)[1:][seen[1:]].max())
        return np.cumsum(worth)


class SizeChooser:
    """Chooses for one generation of `batch` rows with a drafter whose trees have `size` nodes, the likeliest first."""

    def __init__(self, times: StepTimes, batch: int, size: int, acceptance: Acceptance | None = None) -> None:
        self._times, self._batch = times, batch
        self._acceptance = acceptance or Acceptance(size)
        self._acceptance.doubt()
        self.sizes = [n for n in SIZES if n < size] + [size]
        self.size = self._first = min(self.sizes, key=lambda n: abs(n - FIRST))
        """Nodes of the next step."""
        self._step = 0
        self._plain, self._patience = 0, PATIENCE  # plain steps since the last draft, and before the next
        self._last = dict.fromkeys(self.sizes, 0)
        if times.known(batch, 1) is None:
            self.size = 1  # what the others are compared with
        else:
            self._decide()

    def add(self, paths: Sequence[Sequence[int]], seconds: float | None) -> None:
        """One step of the present size: the kept nodes of each row, and how long it took, None where that says nothing
        of others.
        """
        if seconds is not None:
            self._times.add(self._batch, self.size, seconds)
        self._step += 1
        self._plain = self._plain + 1 if self.size == 1 else 0
        self._last[self.size] = self._step
        self._acceptance.add(paths, self.size)
        if self._step % EVERY == 0:
            self._decide()

    def add_plain(self, seconds: float) -> None:
        """One step of size 1."""
        self._times.add(self._batch, 1, seconds)
        self._step += 1
        self._plain += 1
        self._last[1] = self._step
        if self._step % PLAIN == 0:
            self._acceptance.fade(PLAIN)
            self._decide()
        elif self._times.known(self._batch, 1) is not None and not self._drafted:
            self._decide()  # no need to wait

    @property
    def _drafted(self) -> bool:
        """Whether any draft was verified yet."""
        return bool(self._acceptance.met[1:].any())

    def _decide(self) -> None:
        if not self._drafted:
            self.size = self._first
            return
        if self._times.known(self._batch, self.size) is None:
            return  # once more
        tokens = self._acceptance.tokens()
        rates = {n: tokens[n - 1] / self._guess(n) for n in self.sizes}
        best = max(rates, key=lambda n: rates[n])
        if best > 1:
            self._patience = PATIENCE
        elif self._plain >= self._patience:
            self.size = max(self.sizes[1:], key=lambda n: rates[n])
            self._patience *= 2
            return
        stale = [n for n in self.sizes if self._step - self._last[n] > STALE and rates[n] > 0.8 * rates[best]]
        self.size = stale[0] if stale else best

    def _guess(self, nodes: int) -> float:
        """Seconds of a step, measured or hoped: as fast as the next smaller size, or half of the next larger one."""
        if (known := self._times.known(self._batch, nodes)) is not None:
            return known
        smaller = [t for n in self.sizes if n < nodes and (t := self._times.known(self._batch, n)) is not None]
        larger = [t for n in self.sizes if n > nodes and (t := self._times.known(self._batch, n)) is not None]
        return max([*smaller, *(0.5 * t for t in larger[:1])])
