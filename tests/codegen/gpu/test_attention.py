"""Attention over a cache by the Triton kernels, interpreted, against the specification in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES, error, operands
from codegen_gpu import interpreted_launches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelc.codegen.gpu import attention, attention_kernels
from accelc.codegen.gpu.attention import Blocks, attention_gpu, choose_blocks
from accelc.codegen.gpu.errors import KernelInputError

_interpreted = interpreted_launches((attention_kernels, attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, dtype: torch.dtype) -> None:
    given_case = {"heads": 4, "key_heads": 2, "d": 32, "dv": 32} | CASES[name]
    assert error(operands(**given_case, dtype=dtype)) <= 1


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=3), n=st.integers(1, 20), group=st.integers(1, 3),
    key_heads=st.integers(1, 2), d=st.sampled_from([16, 24, 32, 48]), tree=st.booleans(),
    mask=st.sampled_from(["causal", "window", "chunk"]), window=st.integers(1, 40), softcap=st.sampled_from([0.0, 5.0]),
    sinks=st.booleans(), slopes=st.booleans(), bias=st.sampled_from(["", "float", "bool"]),
    splits=st.sampled_from([1, 2, 8]), slots=st.sampled_from([16, 64]), rows=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_all_together(
    lengths: list[int], n: int, group: int, key_heads: int, d: int, splits: int, slots: int, rows: int, **options: Any
) -> None:
    made = operands(lengths, n, group * key_heads, key_heads, d, d, **options)
    assert error(made, Blocks(rows, slots, splits)) <= 1


def test_the_same_bits_each_time_and_for_views() -> None:
    query, key, *rest = operands([30, 4], 3, 4, 2, 32, 32, dtype=torch.bfloat16)
    first = attention_gpu(query, key, *rest)
    assert torch.equal(first, attention_gpu(query, key, *rest))
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    slots_first = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(first, attention_gpu(turned, slots_first, *rest))
    assert first.transpose(1, 2).is_contiguous()


def test_splits_fill_the_chip_and_no_more() -> None:
    assert choose_blocks(1, 8, 4, 128, 8192, 132, torch.bfloat16) == Blocks(16, 64, 32)
    assert choose_blocks(64, 8, 4, 128, 8192, 132, torch.bfloat16).splits == 1
    assert choose_blocks(1, 8, 4, 128, 100, 132, torch.bfloat16).splits == 2
    assert choose_blocks(1, 1, 16, 576, 8192, 132, torch.bfloat16).rows == 16


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(KernelInputError, match="float64"):
        attention_gpu(*operands([3], 1, 2, 1, 16, 16, dtype=torch.float64))
