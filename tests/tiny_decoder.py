"""A small hand-written transformer, once as a cached step that follows the step contract and once as a plain forward.

The two share weights and nothing else: the step writes caches and masks by position, the forward is causal attention
over the whole text. Everything is float64, so that greedy choices agree exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelc.ir.dialect import attention_reference
from accelc.ir.state import StateSpec
from accelc.runtime import Decoder

VOCAB, WIDTH, HEADS, KV_HEADS, LAYERS = 61, 32, 4, 2, 2
HEAD = WIDTH // HEADS


class Tiny:
    """Two pre-norm layers with grouped-query attention; positions are a learned table of exactly max_length rows."""

    def __init__(self, max_length: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

        self.embed = weight(VOCAB, WIDTH) * 4
        self.place = weight(max_length, WIDTH) * 4
        kv = KV_HEADS * HEAD
        self.layers = [
            {"q": weight(WIDTH, WIDTH), "k": weight(kv, WIDTH), "v": weight(kv, WIDTH), "o": weight(WIDTH, WIDTH) * 2,
             "up": weight(2 * WIDTH, WIDTH), "down": weight(WIDTH, 2 * WIDTH) * 2}
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.max_length = max_length
        self.poison: int | None = None
        """A token id whose logits become NaN, as do its cached rows."""
        self.calls: list[tuple[str, int]] = []
        """Which callable ran with how many tokens."""

    def states(self) -> list[StateSpec]:
        shape = ("B", KV_HEADS, "S", HEAD)
        return [StateSpec(f"{kind}{i}", shape, torch.float64, 2) for i in range(LAYERS) for kind in "kv"]

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, HEAD)).transpose(1, 2)

    def hidden(self, tokens: Tensor, positions: Tensor, lengths: Tensor, *states: Tensor) -> Tensor:
        x = self.embed[tokens] + self.place[positions]
        if self.poison is not None:
            x = torch.where((tokens == self.poison)[..., None], torch.nan, x)
        for i, w in enumerate(self.layers):
            h = F.layer_norm(x, (WIDTH,))
            keys, values = states[2 * i], states[2 * i + 1]
            write(keys, self._heads(h @ w["k"].T, KV_HEADS), lengths)
            write(values, self._heads(h @ w["v"].T, KV_HEADS), lengths)
            query = self._heads(h @ w["q"].T, HEADS)
            mixed = attention_reference(
                query, keys, values, positions, lengths, None, None, None, None, "causal", 0, HEAD**-0.5, 0.0
            )
            x = x + mixed.transpose(1, 2).flatten(2) @ w["o"].T
            x = x + F.gelu(F.layer_norm(x, (WIDTH,)) @ w["up"].T) @ w["down"].T
        return x

    def many(self, tokens: Tensor, positions: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor]:
        self.calls.append(("many", tokens.shape[1]))
        return (F.layer_norm(self.hidden(tokens, positions, lengths, *states), (WIDTH,)) @ self.embed.T,)

    def decode(self, tokens: Tensor, positions: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor]:
        assert tokens.shape[1] == 1
        logits = self.many(tokens, positions, lengths, *states)
        self.calls[-1] = ("decode", 1)
        return logits

    def prefill(
        self, tokens: Tensor, positions: Tensor, lengths: Tensor, last: Tensor, *states: Tensor
    ) -> tuple[Tensor]:
        self.calls.append(("prefill", tokens.shape[1]))
        x = self.hidden(tokens, positions, lengths, *states)
        x = x[torch.arange(len(x)), last][:, None]
        return (F.layer_norm(x, (WIDTH,)) @ self.embed.T,)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [T, V] of tokens [T], without a cache."""
        x = self.embed[tokens] + self.place[: len(tokens)]
        for w in self.layers:
            h = F.layer_norm(x, (WIDTH,))
            q, k, v = ((h @ w[name].T).unflatten(-1, (-1, HEAD)).transpose(0, 1)[None] for name in "qkv")
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + mixed[0].transpose(0, 1).flatten(1) @ w["o"].T
            x = x + F.gelu(F.layer_norm(x, (WIDTH,)) @ w["up"].T) @ w["down"].T
        return F.layer_norm(x, (WIDTH,)) @ self.embed.T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """`count` greedy tokens by recomputing the whole text for each."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.forward(torch.tensor(ids))[-1].argmax()))
        return ids[len(prompt) :]

    def decoder(self, *, chunk: int = 8, prefill: bool = True, **options: object) -> Decoder:
        return Decoder(
            self.decode,
            self.many,
            self.states(),
            prefill=self.prefill if prefill else None,
            max_length=self.max_length,
            chunk=chunk,
            vocab_size=options.pop("vocab_size", VOCAB),  # type: ignore[arg-type]
            **options,  # type: ignore[arg-type]
        )


def write(cache: Tensor, fresh: Tensor, lengths: Tensor) -> None:
    """Write fresh [B, Hk, N, D] into cache [B, Hk, S, D] behind the lengths; an overflow is an index error."""
    for row, length in enumerate(lengths.tolist()):
        cache[row, :, length : length + fresh.shape[2]] = fresh[row]


def prompts_of(lengths: list[int], seed: int = 1) -> list[list[int]]:
    """Random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]
