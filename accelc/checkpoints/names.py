"""From the names and pieces that tensors have in files to those of the model's parameters.

transformers renames tensors of older or other layouts when it loads them, and merges some (the experts of a layer into
one tensor). The rules are its own; this is the only file that knows of them. Written against transformers 5.23.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Merge:
    """Parameters ``targets`` that are made of several tensors of the files: (pattern, name) each, in order."""

    converter: Any
    first: str
    targets: list[str]
    sources: list[tuple[str, str]] = field(default_factory=list)

    def make(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters, by name, of the tensors that `read` gives."""
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.first, name, pattern, lambda name=name: read(name))
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def miscounted(self, count: int) -> tuple[list[str], list[str]]:
        """Names that lack and names that are too many where each pattern with a number, as those of experts have, is
        for the numbers below `count`.
        """
        found = {name: match for pattern, name in self.sources if (match := _numbered(pattern).search(name))}
        if not found:
            return [], []
        first, match = next(iter(found.items()))
        begin = first[: match.start()]
        patterns = [pattern for pattern in self.converter.source_patterns if "*" in pattern]
        wanted = {begin + pattern.replace("*", str(number)): None for pattern in patterns for number in range(count)}
        return [name for name in wanted if name not in found], [name for name in found if name not in wanted]


class Names:
    """The rules of one model."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = dict(model.state_dict())
        buffers = [name for name, _ in model.named_buffers()]
        patterns = set(model._keys_to_ignore_on_load_unexpected or ())
        patterns |= {r"rotary_emb\.inv_freq$"} if any(b.endswith("inv_freq") for b in buffers) else set()
        patterns |= {r"(^|\.)position_ids$"} if any(b.endswith("position_ids") for b in buffers) else set()
        self._unused = [re.compile(p) for p in patterns]
        self._optional = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]

    def of(self, name: str) -> tuple[str, str | None]:
        """The parameter that the tensor `name` is (a part of), and the pattern of the merge it takes part in."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._known)
        if renamed not in self._known and name in self._known:
            return name, None
        return renamed, pattern

    def merge(self, first: str, pattern: str) -> Merge:
        """The merge whose first parameter is `first`."""
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        targets = [first.replace(converter.target_patterns[0], t) for t in converter.target_patterns]
        return Merge(converter, first, targets)

    def unused(self, name: str) -> bool:
        """Whether transformers would leave out a tensor of that name without a word."""
        return any(pattern.search(name) for pattern in self._unused)

    def optional(self, name: str) -> bool:
        """Whether transformers would do without the parameter."""
        return any(pattern.search(name) for pattern in self._optional)


def _numbered(pattern: str) -> re.Pattern[str]:
    """What a pattern of names matches; its * is a number."""
    return re.compile(re.escape(pattern).replace(r"\*", r"\d+"))


def natural(names: Iterable[str]) -> list[str]:
    """Names sorted with their numbers as numbers: the experts of a merge come in this order."""
    return sorted(names, key=lambda name: [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")])
