"""Prompt lookup: copy what came behind the same tokens earlier in the text (input-guided aggressive decoding)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accelc.ir.errors import DraftError
from accelc.runtime.arguments import is_integer
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
from accelc.runtime.speculation.trees import LIMIT, Layout, Tree


@register_drafter
@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Drafts the `tokens` that followed the latest earlier occurrence of the text's last `ngram` tokens, or of fewer
    where those did not occur (Saxena 2023; Ge et al. 2022). Needs no training, pays where output repeats input.
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
        self.options = options
        self.size, self.depth = options.tokens + 1, options.tokens
        self.layout = Tree.chain(options.tokens).layout(setting.device)

    def start(self, text: Text) -> Proposer:
        return Lookup(self.layout, self.options.ngram)


class Lookup(Proposer):
    """The look-up is a comparison of the whole text with its own end, shifted: no state, no loop over tokens."""

    def __init__(self, layout: Layout, ngram: int) -> None:
        self._layout, self._ngram = layout, ngram

    def propose(self, text: Text) -> Draft:
        tokens, lengths = text.tokens, text.lengths[:, None]
        longest = tokens.shape[1]
        place = torch.arange(longest, device=tokens.device)
        # How many of the last tokens are those that end at each place, up to `ngram`.
        equal = torch.ones_like(tokens, dtype=torch.bool)
        matched = torch.zeros_like(tokens)
        for back in range(self._ngram):
            wanted = tokens.gather(1, (lengths - 1 - back).clamp(min=0))
            shifted = tokens if back == 0 else torch.nn.functional.pad(tokens, (back, 0), value=NOTHING)[:, :longest]
            equal = equal & (shifted == wanted) & (lengths > back)
            matched = matched + equal
        matched = torch.where(place < lengths - 1, matched, 0)  # something must follow
        end = (matched * longest + place).argmax(-1, keepdim=True)
        count = self._layout.size - 1
        source = end + 1 + torch.arange(count, device=tokens.device)
        found = (matched.gather(1, end) > 0) & (source < lengths)
        drafts = torch.where(found, tokens.gather(1, source.clamp(max=longest - 1)), NOTHING)
        return Draft(torch.cat([text.last()[:, None], drafts], dim=1), self._layout)
