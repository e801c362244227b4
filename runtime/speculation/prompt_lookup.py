"""Prompt lookup: copy what came behind the same tokens earlier in the text (input-guided aggressive decoding)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelc.ir.errors import DraftError
from accelc.runtime.arguments import is_integer
from accelc.runtime.functions import TensorFunction
from accelc.runtime.session import TappedChunk
from accelc.runtime.speculation.draft import (
    NOTHING,
    Draft,
    Drafter,
    DraftKind,
    Proposer,
    Setting,
    Source,
    Text,
    register_drafter,
)
from accelc.runtime.speculation.target import TargetSampler
from accelc.runtime.speculation.trees import LIMIT, Layout, Tree


@register_drafter
@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Drafts the `tokens` that followed the latest earlier occurrence of the text's last `ngram` tokens, or of fewer
    where those did not occur (Saxena 2023; Ge et al. 2022), over again where the text ends before. Needs no training,
    pays where output repeats itself or its input.
    """

    name: ClassVar[str] = "prompt_lookup"
    kind: ClassVar[DraftKind] = DraftKind.DETERMINISTIC

    tokens: int = 8
    ngram: int = 3

    def __post_init__(self) -> None:
        for name, most in (("tokens", LIMIT - 1), ("ngram", 16)):
            value = getattr(self, name)
            if not is_integer(value) or not 1 <= value <= most:
                raise DraftError(f"{name} is {value!r}", remedy=f"Give an integer from 1 to {most}.")

    def bind(self, setting: Setting) -> Source:
        return _Source(self, setting)


class _Source(Source):
    def __init__(self, options: PromptLookup, setting: Setting) -> None:
        self.size, self.depth = options.tokens + 1, options.tokens
        layout = Tree.chain(options.tokens).layout(setting.device)
        self._proposer = _Lookup(functools.partial(look_up, ngram=options.ngram, count=options.tokens), layout, setting)

    def start(self, text: Text, sampler: TargetSampler, prompts: Sequence[TappedChunk]) -> Proposer:
        return self._proposer


class _Lookup(Proposer):
    repeatable = True

    def __init__(self, function: TensorFunction, layout: Layout, setting: Setting) -> None:
        self._function, self._layout, self._call = function, layout, setting.call

    def propose(self, text: Text, nodes: int) -> Draft:
        (tokens,) = self._call(self._function, text.tokens, text.lengths)
        return Draft(tokens, self._layout)


def look_up(tokens: Tensor, lengths: Tensor, ngram: int, count: int) -> tuple[Tensor]:
    """The last token and `count` drafts [B, 1 + count] for texts [B, L] of lengths [B]: the text is compared with its
    own end, shifted; no state, no loop over tokens.
    """
    longest, end = tokens.shape[1], lengths[:, None]
    place = torch.arange(longest, device=tokens.device)
    # How many of the last tokens are those that end at each place, up to `ngram`.
    equal = (place < end - 1).expand_as(tokens)  # something must follow
    matched = torch.where(equal, 0, 0)
    for back in range(ngram):
        wanted = tokens.gather(1, (end - (1 + back)).clamp(min=0))
        before = (place - back).clamp(min=0).expand_as(tokens)
        equal = equal & (tokens.gather(1, before) == wanted) & ((place >= back) & (end > back))
        matched = matched + equal
    # The longest match, and the latest of those: the first of equals in the text turned round.
    turned = (longest - 1 - place).expand_as(tokens)
    best = torch.ops.accelc.top_k(matched.gather(1, turned).float(), 1) * -1 + (longest - 1)
    # A text that repeats itself goes on so: what lies between the match and the end comes again and again.
    source = best + 1 + remainder(torch.arange(count, device=tokens.device), (end - 1 - best).clamp(min=1), count)
    drafts = torch.where(matched.gather(1, best) > 0, tokens.gather(1, source.clamp(max=longest - 1)), NOTHING)
    return (torch.cat([tokens.gather(1, end - 1), drafts], dim=1),)


def remainder(numbers: Tensor, divisors: Tensor, end: int) -> Tensor:
    """numbers % divisors for numbers in [0, end) and positive divisors: by subtraction, for which there are kernels."""
    for power in reversed(range((end - 1).bit_length())):
        multiple = divisors * (1 << power)
        numbers = torch.where(numbers >= multiple, numbers - multiple, numbers)
    return numbers
