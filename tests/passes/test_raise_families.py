"""The raise passes over whole models: how often each matches in each family, and that the logits stay the same."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from raising import assert_same, normalised, with_passes

PASSES = ("raise_norms", "raise_rotary", "raise_gated_activation", "raise_attention")

# norms, rotaries, gates and named activations, attentions
COUNTS = {
    "llama": (5, 4, 2, 2),
    "llama_tied": (5, 4, 2, 2),
    "llama3_rope": (5, 4, 2, 2),
    "gpt2": (0, 0, 2, 2),
    "opt": (0, 0, 0, 2),
    "qwen2": (5, 4, 2, 2),
    "qwen3": (9, 4, 2, 2),
    "mistral": (5, 4, 2, 2),
    "gemma2": (9, 4, 2, 2),
    "gemma3": (13, 4, 2, 2),
    "phi3": (5, 4, 2, 2),
    "bloom": (0, 0, 2, 2),
    "mpt": (0, 0, 0, 2),
    "gptj": (0, 4, 2, 2),
    "gpt_neox": (0, 4, 0, 2),
    "falcon": (0, 4, 0, 2),
    "falcon_alibi": (0, 0, 0, 2),
    "falcon_grouped": (0, 4, 0, 2),
    "mixtral": (5, 4, 2, 2),
    "qwen2_moe": (5, 4, 4, 2),
    "gpt_oss": (5, 4, 0, 2),
    "deepseek_v3": (9, 4, 3, 2),
    "cohere": (3, 4, 2, 2),
    "llama4_text": (15, 6, 6, 4),
    "starcoder2": (0, 4, 0, 2),
    "olmo2": (9, 4, 2, 2),
    "nano_gpt": (0, 0, 0, 2),
    "einsum_attention": (0, 0, 0, 2),
    "token_mask": (0, 0, 0, 2),
    "bidirectional": (0, 0, 0, 2),  # whether it is causal is for others to find out
    "transposed_attention": (0, 0, 0, 0),
    "causal_average": (0, 0, 0, 0),
}


@pytest.mark.parametrize("family", COUNTS)
def test_counts(family: str) -> None:
    model = FAMILIES[family].build()
    before = normalised(model)
    results = with_passes(before, PASSES)
    assert tuple(result.matches for result in results) == COUNTS[family]
    assert_same(before, results[-1].program, FAMILIES[family].vocabulary)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3"])
def test_eager_attention(family: str) -> None:
    model = FAMILIES[family].build()
    model.set_attn_implementation("eager")
    before = normalised(model)
    results = with_passes(before, PASSES)
    assert tuple(result.matches for result in results) == COUNTS[family]
    assert_same(before, results[-1].program, FAMILIES[family].vocabulary)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "cohere"])
def test_sixteen_bits_lose_nothing(family: str) -> None:
    """Rounding differs from place to place, so both programs are compared with the same weights in fp64."""
    model = FAMILIES[family].build().to(torch.bfloat16)
    before = normalised(model)
    results = with_passes(before, PASSES)
    assert tuple(result.matches for result in results) == COUNTS[family]
    exact = normalised(model.double())
    ids = torch.randint(3, FAMILIES[family].vocabulary, (3, 19))
    (want,), (rounded,), (got,) = exact.run(ids), before.run(ids), results[-1].program.run(ids)
    assert (got - want).abs().mean() < 1.25 * (rounded - want).abs().mean()
