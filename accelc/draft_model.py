"""DraftModel: a second, smaller model drafts for the first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from accelc.ir.errors import DraftError
from accelc.runtime import Decoder
from accelc.runtime.arguments import is_integer
from accelc.runtime.speculation.draft import Drafter, DraftKind, Setting, Source, register_drafter
from accelc.runtime.speculation.second_model import SecondModel
from accelc.runtime.speculation.trees import LIMIT, Tree


@register_drafter
@dataclass(frozen=True, eq=False)
class DraftModel(Drafter):
    """Drafts what a second model with the same vocabulary says: chains drawn from its distribution (greedy where the
    row is), or trees of its likeliest tokens (Leviathan et al. 2023; Miao et al. 2024).

    * ``model``: a module, a directory, or a decoder that `accelc.compile` made of one.
    * ``tokens``: drafts of a chain. ``tree``: a tree in place of the chain, whatever ``tokens`` says.
    * ``quantize``: keep its weights in few bits: drafts may be worse, never the output.
    """

    name: ClassVar[str] = "draft_model"

    model: nn.Module | str | Path | Decoder
    tokens: int = 4
    tree: Tree | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module | str | Path | Decoder):
            raise DraftError(
                f"the draft model is {type(self.model).__name__}", remedy="Give a module, a directory or a decoder."
            )
        if not is_integer(self.tokens) or not 1 <= self.tokens < LIMIT:
            raise DraftError(f"tokens is {self.tokens!r}", remedy=f"Give an integer from 1 to {LIMIT - 1}.")
        if self.tree is not None and (not isinstance(self.tree, Tree) or self.tree.depth < 1):
            raise DraftError(
                f"tree is {self.tree!r}",
                remedy='Give a Tree with at least one node behind its root; "dynamic" ones are drafted by heads alone.',
            )

    @property
    def kind(self) -> DraftKind:  # type: ignore[override]
        return DraftKind.INDEPENDENT if self.tree is None else DraftKind.DETERMINISTIC

    def bind(self, setting: Setting) -> Source:
        if isinstance(self.model, Decoder):
            return SecondModel(self.model, self.tokens, self.tree, setting)
        from accelc.compiler import compile

        decoder = compile(self.model, max_length=setting.max_length, quantize=self.quantize)
        return SecondModel(decoder, self.tokens, self.tree, setting)
