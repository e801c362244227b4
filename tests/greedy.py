"""Greedy decoding compared token by token; where two ways part, the logits decide whether it is a tie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TIE = 1e-4
"""Logits closer than this share of their spread are a tie: rounding decides which comes first."""


@dataclass(frozen=True)
class Parting:
    """The first token at which two continuations differ, with the reference logits' gap between the two tokens."""

    index: int
    expected: int
    got: int
    gap: float
    spread: float

    @property
    def is_tie(self) -> bool:
        return self.gap <= TIE * self.spread

    def __str__(self) -> str:
        kind = "tie" if self.is_tie else "DIFFERENT"
        return (
            f"{kind} at new token {self.index}: {self.expected} expected, {self.got} decoded, "
            f"logits {self.gap:.2e} apart of {self.spread:.1f}"
        )


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own logits [B, T, V], nothing cached."""
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def reference(model: nn.Module, prompt: Tensor, new_tokens: int) -> list[int]:
    """Greedy continuation of prompt [T]: transformers' generate where the model has it, else the forward again and
    again.
    """
    if hasattr(model, "generate"):
        with torch.no_grad():
            out = model.generate(
                prompt[None], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        return out[0, len(prompt) :].tolist()
    ids = prompt[None]
    for _ in range(new_tokens):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def parting(model: nn.Module, prompt: Tensor, expected: list[int], got: list[int]) -> Parting | None:
    """Where two continuations of prompt [T] part, None when they are equal."""
    for index, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a != b:
            ids = torch.cat([prompt, torch.tensor(expected[:index], dtype=torch.int64)])[None]
            logits = logits_of(model, ids)[0, -1].double()
            return Parting(index, a, b, float((logits[a] - logits[b]).abs()), float(logits.max() - logits.min()))
    return None
