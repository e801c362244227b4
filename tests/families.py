"""The models that tests run over: `FAMILIES` maps a name to how the model is built and what must come of it.

@pytest.mark.parametrize("family", names(Expect.DERIVED))
def test_greedy(family):
    model = FAMILIES[family].build()
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from models import library, plain
from torch import nn


class Expect(enum.Enum):
    """What compiling the model must lead to."""

    DERIVED = "derived"
    """A decoder whose logits equal the model's."""
    DERIVED_OR_REFUSED = "derived or refused"
    """Mixes tokens without attention: a correct decoder, or an error that names the node; never a wrong one."""
    REFUSED = "refused"
    """An error that says why the model has no step."""
    NO_LOGITS = "no logits"
    """An error that says that the forward returns no logits."""


@dataclass(frozen=True)
class Family:
    """A model under test; `build` returns it in fp32 and evaluation mode, with the same weights on every call."""

    name: str
    build: Callable[[], nn.Module]
    expect: Expect
    vocabulary: int = plain.VOCABULARY
    positions: int = plain.POSITIONS


def _library() -> list[Family]:
    return [
        Family(name, partial(library.build, name), Expect.DERIVED, library.VOCABULARY, library.POSITIONS)
        for name in library.LIBRARY
    ]


def _plain() -> list[Family]:
    mixers = {
        "nano_gpt": (plain.FusedAttention, Expect.DERIVED),
        "transposed_attention": (plain.TransposedAttention, Expect.DERIVED),
        "einsum_attention": (plain.EinsumAttention, Expect.DERIVED),
        "token_mask": (plain.TokenMaskAttention, Expect.DERIVED),
        "causal_average": (plain.CausalAverage, Expect.DERIVED_OR_REFUSED),
        "rolled_shift": (plain.RolledShift, Expect.DERIVED_OR_REFUSED),
        "padded_shift": (plain.PaddedShift, Expect.DERIVED_OR_REFUSED),
        "causal_convolution": (plain.CausalConvolution, Expect.DERIVED_OR_REFUSED),
        "running_sum": (plain.RunningSum, Expect.DERIVED_OR_REFUSED),
        "bidirectional": (plain.BidirectionalAttention, Expect.REFUSED),
    }
    families = [Family(name, partial(plain.build, mixer), expect) for name, (mixer, expect) in mixers.items()]
    attention = plain.FusedAttention
    return [
        *families,
        Family("length_as_number", partial(plain.build, attention, plain.LengthAsNumber), Expect.REFUSED),
        Family("no_logits", partial(plain.build, attention, plain.NoLogits), Expect.NO_LOGITS),
    ]


FAMILIES: dict[str, Family] = {family.name: family for family in _library() + _plain()}


def names(*expected: Expect) -> list[str]:
    """Names of the families with one of the given expectations; all when none is given."""
    return [family.name for family in FAMILIES.values() if not expected or family.expect in expected]


ONE_OF_EACH = ("llama", "gpt2", "gemma2", "bloom", "deepseek_v3", "gpt_oss", "llama4_text", "mixtral")
"""Grouped heads, no groups, soft caps, ALiBi, latents, sinks, chunks, experts."""


def sampled() -> list[Any]:
    """The families with a step for a test that takes long: one of each kind, and the others as slow tests."""
    others = [pytest.param(name, marks=pytest.mark.slow) for name in names(Expect.DERIVED) if name not in ONE_OF_EACH]
    return [*ONE_OF_EACH, *others]
