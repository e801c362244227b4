"""The pipelines, as tables of contents: which passes make a step of a captured forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from accelc.passes import Pass, Pipeline
from accelc.passes.absorb_projections import AbsorbProjections
from accelc.passes.derive_step import DeriveStep
from accelc.passes.last_logits import LastLogits
from accelc.passes.normalise import Normalise
from accelc.passes.raise_attention import RaiseAttention
from accelc.passes.raise_gated_activation import RaiseGatedActivation
from accelc.passes.raise_norms import RaiseNorms
from accelc.passes.raise_rotary import RaiseRotary
from accelc.passes.recognise_masks import RecogniseMasks


def step_pipeline(extra: Sequence[Pass] = (), disabled: Collection[str] = (), *, tree: bool = False) -> Pipeline:
    """From a forward program to a step: tokens, positions, lengths, states -> logits of every new token."""
    return Pipeline(
        [
            Normalise(),
            RaiseNorms(),
            RaiseRotary(),
            RaiseGatedActivation(),
            RaiseAttention(),
            AbsorbProjections(),
            DeriveStep(tree=tree),
            RecogniseMasks(),
            *extra,
        ],
        disabled=disabled,
    )


def prefill_pipeline() -> Pipeline:
    """From a step to one that returns the logits of a single token a row."""
    return Pipeline([LastLogits()])
