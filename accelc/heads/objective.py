"""What heads are trained for, and how well they guess."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from accelc.heads.modules import DraftHeads

RANKS = 10
"""Candidates of a head whose accuracy is measured."""


class Objective(nn.Module):
    """The loss of each head over whole sequences, all tokens known.

    Head i reads the state of token t (and the embeddings of t + 1 .. t + i + 1, where it is sequential) and is to guess
    token t + i + 2. ``teacher``: it is to give the distribution that the model itself gives there, not the token.
    """

    def __init__(self, heads: DraftHeads, *, teacher: bool) -> None:
        super().__init__()
        self.heads, self.teacher = heads, teacher

    def forward(self, hidden: Tensor, embeddings: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        """hidden [B, T, H], embeddings [B, T, E] and tokens [B, T] of sequences, and the model's logits [B, T, V]:
        the mean loss of each head in nats a token, [heads].
        """
        losses = []
        for index, scores in enumerate(guesses(self.heads, hidden, embeddings)):
            flat = scores.float().flatten(0, 1)
            if self.teacher:
                wanted = logits[:, index + 1 : -1].float().softmax(-1).flatten(0, 1)
            else:
                wanted = tokens[:, index + 2 :].flatten()
            losses.append(functional.cross_entropy(flat, wanted))
        return torch.stack(losses)


def guesses(heads: DraftHeads, hidden: Tensor, embeddings: Tensor) -> list[Tensor]:
    """Of each head the logits [B, T - i - 2, V] for the tokens from i + 2 on."""
    length = hidden.shape[1]
    read, found = heads.contextual(hidden), []
    for index in range(heads.config.heads):
        count = length - index - 2
        path = [embeddings[:, 1 + step : 1 + step + count] for step in range(index + 1)]
        found.append(heads.score(index, read[:, :count], path))
    return found


@torch.no_grad()
def accuracy(heads: DraftHeads, hidden: Tensor, embeddings: Tensor, logits: Tensor) -> Tensor:
    """How many times each head's candidate of each rank is the token that the model itself takes there: int64
    [heads, ranks]; the tokens before are those of the text.
    """
    found = []
    for index, scores in enumerate(guesses(heads, hidden, embeddings)):
        taken = logits[:, index + 1 : -1].argmax(-1, keepdim=True)
        best = scores.topk(min(RANKS, scores.shape[-1])).indices
        found.append((best == taken).flatten(0, 1).sum(0))
    return torch.stack(found)
