"""The networks of Medusa and Hydra heads, as plain modules: for training, and captured into programs for drafting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from accelc.ir.errors import DraftError

MEDUSA, HYDRA = "medusa", "hydra"
KINDS = (MEDUSA, HYDRA)
HEAD_SIZE = 64
"""Width of an attention head of the prefix layer, where it divides the hidden states."""


@dataclass(frozen=True)
class HeadsConfig:
    """Sizes of a set of heads. Head i (from 0) guesses the token i + 2 places behind the one whose hidden state it
    reads; the model itself guesses the next.

    * ``kind``: "medusa" heads read the hidden state alone (Cai et al. 2024); "hydra" heads the embeddings of the
      guessed tokens before theirs as well (Ankner et al. 2024).
    * ``layers``: residual blocks of a head. ``prefix``: one decoder layer over all hidden states in front of the heads
      (Hydra++).
    """

    kind: str
    hidden: int
    """H: width of the model's last hidden states."""
    embedding: int
    """E: width of its token embeddings."""
    vocab_size: int
    """V: tokens that it scores."""
    heads: int = 4
    layers: int = 1
    prefix: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DraftError(f"the kind of heads is {self.kind!r}", remedy=f"Known: {', '.join(KINDS)}.")
        for name in ("hidden", "embedding", "vocab_size", "heads", "layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DraftError(f"{name} of the heads is {value!r}", remedy="Give an integer of at least 1.")
        if not isinstance(self.prefix, bool):
            raise DraftError(f"prefix of the heads is {self.prefix!r}", remedy="Give True or False.")

    @property
    def sequential(self) -> bool:
        """Whether a head reads the tokens guessed before its own."""
        return self.kind == HYDRA

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class ResidualBlock(nn.Module):
    """x + silu(linear(x)); a block that narrows its input adds a projection of it. Starts as that, the silu at zero."""

    def __init__(self, width: int, reads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(reads, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.narrow = nn.Linear(reads, width) if reads != width else None
        if self.narrow is not None:  # starts as the hidden state, which stands first
            with torch.no_grad():
                self.narrow.weight.copy_(torch.eye(width, reads))
            nn.init.zeros_(self.narrow.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., reads] -> [..., width]."""
        kept = x if self.narrow is None else self.narrow(x)
        return kept + functional.silu(self.linear(x))


class Head(nn.Module):
    """Residual blocks and a projection to the vocabulary."""

    def __init__(self, config: HeadsConfig, index: int) -> None:
        super().__init__()
        reads = config.hidden + (index + 1) * config.embedding * config.sequential
        widths = [reads] + [config.hidden] * (config.layers - 1)
        self.blocks = nn.Sequential(*(ResidualBlock(config.hidden, width) for width in widths))
        self.vocabulary = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., reads] -> logits [..., V]."""
        scores: Tensor = self.vocabulary(self.blocks(x))
        return scores


class PrefixLayer(nn.Module):
    """One decoder layer over the hidden states of all tokens so far: hidden [B, T, H] -> [B, T, H].

    Written without a cache, like any model: its step is derived (`accelc.passes.derive_step`). Starts as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.count = width // HEAD_SIZE if width % HEAD_SIZE == 0 else 1
        self.norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        inner = -(-width * 8 // 3 // 32) * 32
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        b, t, h = hidden.shape
        x = self.norm(hidden)
        query, key, value = (
            layer(x).view(b, t, self.count, h // self.count).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        cos, sin = self._rotation(t, h // self.count, hidden)
        query, key = (q * cos + _rotate_half(q) * sin for q in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(b, t, h))
        x = self.mlp_norm(hidden)
        return hidden + self.down(functional.silu(self.gate(x)) * self.up(x))

    @staticmethod
    def _rotation(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables [T, width]."""
        place = torch.arange(0, width, 2, device=like.device).float() / width
        angles = torch.arange(length, device=like.device).float()[:, None] / 10000.0**place
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class DraftHeads(nn.Module):
    """A set of heads, with the layer in front of them where the configuration has one."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        if config.prefix and config.hidden % 2:
            raise DraftError(f"a prefix layer over hidden states of {config.hidden}, which is odd")
        self.config = config
        self.prefix = PrefixLayer(config.hidden) if config.prefix else None
        self.heads = nn.ModuleList(Head(config, index) for index in range(config.heads))

    def start_from(self, vocabulary: Tensor) -> None:
        """Let the heads' projections start as the model's own [V, H], which makes training quick."""
        for head in self.heads:
            with torch.no_grad():
                head.vocabulary.weight.copy_(vocabulary)  # type: ignore[union-attr, operator]

    def contextual(self, hidden: Tensor) -> Tensor:
        """What the heads read, from the hidden states [B, T, H] of whole sequences."""
        return hidden if self.prefix is None else self.prefix(hidden)

    def score(self, index: int, hidden: Tensor, path: Sequence[Tensor]) -> Tensor:
        """Logits [..., V] of head `index` from hidden [..., H] (`contextual`) and the embeddings [..., E] of the tokens
        behind it, as many as it reads.
        """
        read = [hidden, *path[: index + 1]] if self.config.sequential else [hidden]
        scores: Tensor = self.heads[index](torch.cat(read, dim=-1) if len(read) > 1 else hidden)
        return scores
