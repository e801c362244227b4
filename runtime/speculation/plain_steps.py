"""Steps without drafts in a speculative generation, at the price of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelc.runtime.generation import Row
from accelc.runtime.selection import greedy_selector
from accelc.runtime.session import Session
from accelc.runtime.speculation.draft import Text
from accelc.runtime.speculation.target import TargetSampler


class PlainSteps:
    """Chooses and runs one token a row. The text learns of the tokens when it is needed: at `settle`."""

    def __init__(self, session: Session, sampler: TargetSampler, text: Text, width: int) -> None:
        """width: tokens that go to the text at once."""
        self._session, self._sampler, self._text, self._width = session, sampler, text, width
        self._likeliest = greedy_selector(text.tokens.device)
        self._chosen: Tensor | None = None
        """[B], where the sampler must know them."""
        self._waiting: list[list[int]] = [[] for _ in range(session.batch)]

    def choose(self, logits: Tensor) -> list[int]:
        """The next token of each row from its logits [B, V]; -1 where they are not finite."""
        if self._sampler.plain_greedy:
            return self._likeliest(logits)
        self._chosen = self._sampler.following(logits)
        return self._chosen.tolist()

    def step(self, active: Sequence[Row]) -> list[int]:
        """Run the last token of the active rows; the next one of all rows. Call `wait` for those that are taken."""
        tokens = [0] * self._session.batch  # rows that have ended are padded
        for row in active:
            tokens[row.index] = row.tokens[-1]
        return self.choose(self._session.decode(tokens))

    def wait(self, tokens: Sequence[int], active: Sequence[Row]) -> None:
        """These tokens, one a row, which were chosen last, follow in the text."""
        if self._chosen is not None:
            taken = [0] * self._session.batch
            for row in active:
                taken[row.index] = 1
            self._sampler.count(self._chosen[:, None], self._session.active, taken)
        for row in active:
            self._waiting[row.index].append(tokens[row.index])

    def settle(self) -> None:
        """The text gets what waits."""
        if not any(self._waiting):
            return
        longest = max(map(len, self._waiting))
        device = self._text.lengths.device
        for begin in range(0, longest, self._width):
            parts = [tokens[begin : begin + self._width] for tokens in self._waiting]
            counts = torch.tensor([len(part) for part in parts], device=device)
            padded = torch.tensor([part + [0] * (self._width - len(part)) for part in parts], device=device)
            self._text.append(padded, counts)
        self._waiting = [[] for _ in self._waiting]
