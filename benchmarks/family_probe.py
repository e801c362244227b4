"""What is true of one model type: does it build, run, respect causality, export, mix tokens by attention only?"""

from __future__ import annotations

import dataclasses
import time
import traceback
import warnings

import torch
import transformers
from family_export import export, export_error, sequence_mixers, shorten
from family_models import TokensToLogits, small_model, text
from family_outcome import Outcome, derive_and_check
from family_overrides import NOT_TOKEN_MODELS
from torch import Tensor

BATCH, LENGTH = 2, 11
CHANGED = 7  # the position whose token the causality probe changes
TOLERANCE = 1e-4  # of the largest logit


@dataclasses.dataclass
class Row:
    """One line of the table. Stages that were not reached stay None; `reason` says why the last one reached failed."""

    model_type: str
    builds: bool = False
    runs: bool = False
    causal: bool | None = None
    exports: bool | None = None
    mixers: list[str] | None = None  # what carries tokens along the sequence besides attention
    outcome: str | None = None  # an `Outcome`
    reason: str = ""
    seconds: float = 0.0

    @property
    def eligible(self) -> bool:
        """Causal, exports with a dynamic length, and mixes tokens by attention only."""
        return bool(self.causal and self.exports and self.mixers == [])


def probe(model_type: str, *, derive: bool = True) -> Row:
    """Take one type through all stages; failures of the library or of torch end in the row's reason."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    row = Row(model_type)
    _stages(row, derive)
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _stages(row: Row, derive: bool) -> None:
    if row.model_type in NOT_TOKEN_MODELS:
        row.reason = NOT_TOKEN_MODELS[row.model_type]
        return
    stage = "build"
    try:
        model = TokensToLogits(small_model(row.model_type)).eval()
        row.builds, stage = True, "forward"
        with torch.no_grad():
            logits = model(text(BATCH, LENGTH))
        row.reason = _malformed(logits)
        if row.reason:
            return
        row.runs = True
        row.reason = causality_breach(model)
        row.causal, stage = not row.reason, "export"
        exported = export(model, text(BATCH, LENGTH))
        row.exports = True
        row.mixers = sequence_mixers(exported)
    except Exception as error:  # noqa: BLE001  (any failure of the library's own code is a finding, not ours to handle)
        if stage == "export":
            row.exports = False
            row.reason = row.reason or export_error(error, traceback.format_exc())
        else:
            row.reason = f"{stage}: {shorten(f'{type(error).__name__}: {error}')}"
    if derive and row.runs:
        outcome, reason = derive_and_check(model)
        row.outcome = outcome.value
        if outcome is not Outcome.DERIVED:
            row.reason = row.reason or reason


def _malformed(logits: Tensor) -> str:
    if logits.dim() != 3 or logits.shape[:2] != (BATCH, LENGTH):
        return f"forward: logits have shape {tuple(logits.shape)} for ids {(BATCH, LENGTH)}"
    return "" if bool(torch.isfinite(logits).all()) else "forward: logits are not finite"


@torch.no_grad()
def causality_breach(model: torch.nn.Module) -> str:
    """Say how earlier logits, or another row's, depend on a later token or on the length; empty for a causal model."""
    ids = text(BATCH, LENGTH)
    full = model(ids)
    bound = TOLERANCE * full.abs().max().item()
    changed = ids.clone()
    changed[0, CHANGED] = changed[0, CHANGED] + 1 if changed[0, CHANGED] < 100 else changed[0, CHANGED] - 1
    difference = (model(changed) - full).abs().amax(-1)  # [B, T]
    if difference[0, :CHANGED].max() > bound:
        return f"not causal: a later token changes earlier logits by {difference[0, :CHANGED].max():.1e}"
    if difference[1:].max() > bound:
        return f"not causal: a token of one row changes another row's logits by {difference[1:].max():.1e}"
    if difference[0, CHANGED:].max() <= bound:
        return "forward: the logits do not depend on the tokens"
    shorter = (model(ids[:, :CHANGED]) - full[:, :CHANGED]).abs().max()
    if shorter > bound:
        return f"not causal: earlier logits change by {shorter:.1e} when the sequence is longer"
    return ""
