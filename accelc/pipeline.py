"""The pipelines, as tables of contents: which passes make a step of a captured forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from accelc.ir import Program
from accelc.passes import Pass, Pipeline
from accelc.passes.absorb_projections import AbsorbProjections
from accelc.passes.commit_path import CommitPath
from accelc.passes.derive_step import DeriveStep
from accelc.passes.draft_heads import DraftHeads
from accelc.passes.last_logits import LastLogits
from accelc.passes.normalise import Normalise
from accelc.passes.raise_attention import RaiseAttention
from accelc.passes.raise_gated_activation import RaiseGatedActivation
from accelc.passes.raise_norms import RaiseNorms
from accelc.passes.raise_rotary import RaiseRotary
from accelc.passes.read_codes import ReadCodes
from accelc.passes.recognise_masks import RecogniseMasks
from accelc.passes.tree_attention import TreeAttention


def step_pipeline(extra: Sequence[Pass] = (), disabled: Collection[str] = ()) -> Pipeline:
    """From a forward program to a step: tokens, positions, lengths, states -> logits of every new token."""
    return Pipeline(
        [
            Normalise(),
            ReadCodes(),
            RaiseNorms(),
            RaiseRotary(),
            RaiseGatedActivation(),
            RaiseAttention(),
            AbsorbProjections(),
            DeriveStep(),
            RecogniseMasks(),
            *extra,
        ],
        disabled=disabled,
    )


def prefill_pipeline() -> Pipeline:
    """From a step to one that returns the logits of a single token a row."""
    return Pipeline([LastLogits()])


def verify_pipeline() -> Pipeline:
    """From a step to one whose new tokens are a tree."""
    return Pipeline([TreeAttention()])


def commit_pipeline() -> Pipeline:
    """From a step to the program that keeps the accepted path of a tree."""
    return Pipeline([CommitPath()])


def simplify_pipeline() -> Pipeline:
    """For a captured graph that stays as it is: what a step is made of besides its cache."""
    return Pipeline([Normalise(), ReadCodes(), RaiseNorms(), RaiseGatedActivation()])


def drafting_pipeline(heads: DraftHeads) -> Pipeline:
    """From a program of hidden states to one that drafts."""
    return Pipeline([heads])


def example_inputs(program: Program) -> list[Tensor]:
    """Inputs to compare a forward or a step with the one before a pass: two rows, the step's after five tokens."""
    facts: dict[str, object] = program.facts["capture"]  # type: ignore[assignment]
    length, vocabulary = min(9, int(facts["max_length"])), int(facts["input_vocab_size"])  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (2, length), generator=generator)
    if "lengths" not in program.inputs:
        return [tokens]
    known = torch.tensor([length // 2, length // 3])
    new = length - length // 2
    given = {
        "tokens": tokens[:, :new],
        "positions": known[:, None] + torch.arange(new),
        "lengths": known,
        "last": torch.tensor([new - 1, 0]),
    }
    device = program.device
    states = [
        torch.randn(spec.sizes(2, length + 7), generator=generator).to(spec.dtype)
        if spec.dtype.is_floating_point
        else torch.ones(spec.sizes(2, length + 7), dtype=spec.dtype)
        for spec in program.states
    ]
    return [t.to(device) for t in [*(given[name] for name in program.inputs), *states]]
