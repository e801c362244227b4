"""What is true of one model type: does it build, run, respect causality, export, mix tokens by attention only?"""

from __future__ import annotations

import dataclasses
import time
import traceback
import warnings

import torch
import transformers
from family_causality import causality_breach
from family_export import export, export_error, sequence_mixers, shorten
from family_models import TokensToLogits, small_model, text
from family_outcome import Outcome, derive_and_check, library_agrees
from family_overrides import NOT_TOKEN_MODELS
from torch import Tensor

BATCH, LENGTH = 2, 11


@dataclasses.dataclass
class Row:
    """One line of the table. Stages that were not reached stay None; `reason` says what stands in the way."""

    model_type: str
    builds: bool = False
    runs: bool = False
    causal: bool | None = None
    exports: bool | None = None
    mixers: list[str] | None = None  # what carries tokens along the sequence besides attention
    outcome: str | None = None  # an `Outcome`
    library: bool | None = None  # the model's own `generate` gives the same greedy tokens; None where it fails
    stopped: str = ""  # how the process ended when it was killed, by time or otherwise
    reason: str = ""
    seconds: float = 0.0
    commit: str = ""

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
    model = _build(row)
    if model is not None:
        _export(row, model)
        if derive:
            _derive(row, model)
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _build(row: Row) -> TokensToLogits | None:
    """The model, when it builds, runs on token ids, and its causality could be probed."""
    if row.model_type in NOT_TOKEN_MODELS:
        row.reason = NOT_TOKEN_MODELS[row.model_type]
        return None
    stage = "build"
    try:
        model = TokensToLogits(small_model(row.model_type)).eval()
        row.builds, stage = True, "forward"
        with torch.no_grad():
            logits = model(text(BATCH, LENGTH))
        row.reason = _malformed(logits)
        if row.reason:
            return None
        row.reason = causality_breach(model)
        row.runs, row.causal = True, not row.reason
    except Exception as error:  # noqa: BLE001  (any failure of the library's own code is a finding, not ours to handle)
        row.reason = f"{stage}: {shorten(f'{type(error).__name__}: {error}')}"
        return None
    return model


def _export(row: Row, model: TokensToLogits) -> None:
    try:
        exported = export(model, text(BATCH, LENGTH))
    except Exception as error:  # noqa: BLE001  (torch.export lets through whatever the traced code raises)
        row.exports = False
        row.reason = row.reason or export_error(error, traceback.format_exc())
    else:
        row.exports, row.mixers = True, sequence_mixers(exported)


def _derive(row: Row, model: TokensToLogits) -> None:
    outcome, reason, tokens = derive_and_check(model)
    row.outcome = outcome.value
    if outcome is Outcome.DERIVED:
        row.library = library_agrees(model, tokens)
        if row.causal is False:
            row.outcome = Outcome.WRONG.value
            row.reason = f"derived, although {row.reason}"
    elif row.causal is not False:
        row.reason = reason  # of both reasons, the compiler's own


def _malformed(logits: Tensor) -> str:
    if logits.dim() != 3 or logits.shape[:2] != (BATCH, LENGTH):
        return f"forward: logits have shape {tuple(logits.shape)} for ids {(BATCH, LENGTH)}"
    return "" if bool(torch.isfinite(logits).all()) else "forward: logits are not finite"
