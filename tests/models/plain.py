"""Hand-written language models, each spelling attention, masks or positions another way.

All map ids [B, T] int64 to logits [B, T, V] and differ in the mixing layer alone, which the block takes as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import random_model

VOCABULARY = 97
WIDTH = 48
HEADS = 4
POSITIONS = 256
PAD = 0

Mixer = Callable[[], nn.Module]


class Block(nn.Module):
    """Pre-norm residual block: a layer that mixes tokens, and a two-layer perceptron."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.mixer = mixer
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = x + self.mixer(self.norm_1(x), ids)
        return x + self.mlp(self.norm_2(x))


class Plain(nn.Module):
    """Token and learned position embeddings, two blocks, a norm and a head tied to the token embedding."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList([Block(mixer()) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, ids)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


class FusedAttention(nn.Module):
    """nanoGPT: one projection for queries, keys and values; a stored triangle as the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        triangle = torch.tril(torch.ones(POSITIONS, POSITIONS)).view(1, 1, POSITIONS, POSITIONS)
        self.register_buffer("triangle", triangle)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, T, D]."""
        batch, length, _ = x.shape
        parts = self.qkv(x).split(WIDTH, dim=2)
        q, k, v = (part.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, T, H * D], projected."""
        batch, _, length, _ = y.shape
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.triangle[:, :, :length, :length] == 0, float("-inf"))
        return self.merge(F.softmax(scores, dim=-1) @ v)


class TransposedAttention(FusedAttention):
    """Scores as [keys, queries]: the softmax runs over dim -2."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.heads(x)
        scores = (k @ q.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # [B, H, keys, queries]
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)  # key after query
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-2)
        return self.merge(weights.transpose(-2, -1) @ v)


class EinsumAttention(FusedAttention):
    """Both contractions as einsum over [B, T, H, D]."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, WIDTH // HEADS).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
        position = torch.arange(length, device=x.device)
        scores = torch.where(position[:, None] >= position[None, :], scores, float("-inf"))
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.out(y.reshape(batch, length, WIDTH))


class TokenMaskAttention(FusedAttention):
    """Padding tokens are invisible to all but themselves: the mask depends on the tokens."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.heads(x)
        own = torch.eye(length, dtype=torch.bool, device=x.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        visible = ((ids != PAD)[:, None, None, :] | own) & causal  # [B, 1, T, T]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=visible))


class BidirectionalAttention(FusedAttention):
    """An encoder's attention: every token sees every other."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))


class CausalAverage(nn.Module):
    """Mixing without attention: the mean of all tokens so far, as a matrix of positions times x."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        length = x.shape[1]
        weights = torch.ones(length, length, device=x.device).tril()
        return self.out((weights / weights.sum(-1, keepdim=True)) @ x)


class RolledShift(nn.Module):
    """Each token sees the one before it: torch.roll, and zeros in place of what wraps around."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        first = torch.arange(x.shape[1], device=x.device) == 0
        return torch.roll(x, 1, dims=1).masked_fill(first[None, :, None], 0.0)


class PaddedShift(nn.Module):
    """The same shift as a pad in front and a slice that drops the last token."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, 0))[:, :-1]


class CausalConvolution(nn.Module):
    """A depthwise convolution over the last three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel_size=3, groups=WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class RunningSum(nn.Module):
    """A cumulative sum over tokens, damped by the position."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device)
        return x.cumsum(1) / count[None, :, None]


class LengthAsNumber(Plain):
    """Logits scaled by the length of the whole sequence: causal in its tokens, not in its length."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids) / (ids.shape[1] + 2))


class NoLogits(Plain):
    """Returns its hidden states under a name that is not logits."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.hidden(ids)}


def build(mixer: Mixer, model: Callable[[Mixer], nn.Module] = Plain) -> nn.Module:
    """A hand-written model around `mixer`: fp32, evaluation mode, the same random weights on every call."""
    return random_model(lambda: model(mixer))


class Counting(nn.Module):
    """Says, whatever came before, the number behind a token; hidden states are one-hot."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(size, size), nn.Linear(size, size, bias=False)
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(size))
            self.out.weight.copy_(torch.eye(size).roll(1, 0) * 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids))
