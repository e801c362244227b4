"""Masks that follow from positions alone, read at every pair of them: may a token see a later one?"""

from __future__ import annotations

import torch
import torch.fx as fx

from accelc.ir.errors import DeriveError, NotCausalError, around
from accelc.passes.step.analysis import Analysis
from accelc.passes.step.index_domain import Tables

LONGEST = 2048
"""Positions that are read at most: the work grows with their square."""
HIDDEN = -9e3
"""A bias of at most so much hides a key; models write -1e4, -1e9, the lowest number or -inf."""


def refuse_look_ahead(analysis: Analysis, attentions: list[fx.Node], max_length: int) -> None:
    """Raise `NotCausalError` where the bias of an attention, `full_attention` without a causal flag, shows a query a
    later key. Biases that depend on tokens are left to the check, which runs them.
    """
    length = min(max_length, LONGEST)
    for bias in dict.fromkeys(node.args[3] for node in attentions):
        if not isinstance(bias, fx.Node) or not analysis.is_index(bias):
            continue
        try:
            value = Tables(analysis, max_length).at(bias, 1, length)
        except DeriveError:  # derivation has its own way with what cannot be evaluated, or says so
            continue
        if value.shape[-2:] != (length, length):
            continue
        seen = value if value.dtype == torch.bool else ~(value <= HIDDEN)
        later = seen.flatten(0, -3).any(0).triu(1) if value.dim() > 2 else seen.triu(1)
        if later.any():
            query, key = torch.nonzero(later)[0].tolist()
            raise NotCausalError(
                f"the mask {bias.name} lets position {query} see position {key}, which comes later",
                where="\n" + around(analysis.graph, bias),
            )
