"""Does a model keep to causality, and do its tokens reach each other at all? Seen from its logits alone."""

from __future__ import annotations

import torch
from family_configs import RESERVED_TOKENS
from family_models import text
from torch import Tensor, nn

BATCH, LENGTH = 2, 11
CHANGED = 7  # the position whose token is changed
TOLERANCE = 1e-4  # of the largest logit
REACH = 1e-2  # of the largest logit: later logits move by more, so that a decoder that forgets tokens is seen
SPECIAL = 3  # every third token of the second text is a special one: padding, begin, end, unknown ...


class TokensDoNotReach(Exception):
    """A comparison with this model would show nothing."""


@torch.no_grad()
def causality_breach(model: nn.Module) -> str:
    """Say how earlier logits, or another row's, depend on a later token or on the length; empty for a causal model.

    Tried on ordinary tokens and on a text with special ones, which some models count over the whole sequence.
    Raises TokensDoNotReach for a model whose later logits do not depend on earlier tokens.
    """
    ids = text(BATCH, LENGTH)
    breach = _breach(model, ids)
    if breach:
        return breach
    reach = (model(_changed(ids, 1)) - model(ids)).abs().amax(-1)[0, 2:].max()
    if reach <= REACH * model(ids).abs().max():
        raise TokensDoNotReach(f"changing the second token changes later logits by {reach:.1e}")
    breach = _breach(model, with_special_tokens(ids))
    return f"{breach} (with special tokens)" if breach else ""


def with_special_tokens(ids: Tensor) -> Tensor:
    """The same ids with every third one replaced by a reserved one, another in each place."""
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    rows = torch.arange(ids.shape[0])[:, None]
    return torch.where(columns % SPECIAL == 1, (columns // SPECIAL + rows) % RESERVED_TOKENS, ids)


def _breach(model: nn.Module, ids: Tensor) -> str:
    full = model(ids)
    bound = TOLERANCE * full.abs().max()
    difference = (model(_changed(ids, CHANGED)) - full).abs().amax(-1)  # [B, T]
    if not difference[0, :CHANGED].max() <= bound:
        return f"not causal: a later token changes earlier logits by {difference[0, :CHANGED].max():.1e}"
    if not difference[1:].max() <= bound:
        return f"not causal: a token of one row changes another row's logits by {difference[1:].max():.1e}"
    for length in (CHANGED, 2):
        shorter = (model(ids[:, :length]) - full[:, :length]).abs().max()
        if not shorter <= bound:
            return f"not causal: earlier logits change by {shorter:.1e} when the sequence is longer"
    return ""


def _changed(ids: Tensor, position: int) -> Tensor:
    """The ids with another ordinary token at one position of the first row."""
    changed = ids.clone()
    changed[0, position] += 1 if changed[0, position] < RESERVED_TOKENS + 80 else -1
    return changed
