"""The attention and cache kernels on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES, error, operands

from accelc.codegen.gpu.register import cache_update_cuda
from accelc.ir.dialect import cache_update_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LARGE: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {"lengths": [2000, 8000], "n": 1, "heads": 32, "key_heads": 8, "d": 128, "dv": 128},
    "its tree": {"lengths": [2000], "n": 64, "heads": 32, "key_heads": 8, "d": 128, "dv": 128, "tree": True},
    "its chunk": {"lengths": [512], "n": 256, "heads": 32, "key_heads": 8, "d": 128, "dv": 128},
    "latent": {"lengths": [1000], "n": 3, "heads": 16, "key_heads": 1, "d": 576, "dv": 512, "tree": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_attention(name: str, dtype: torch.dtype) -> None:
    given = operands(**{"heads": 4, "key_heads": 2, "d": 32, "dv": 32} | {**CASES, **LARGE}[name], dtype=dtype)
    assert error(given, device="cuda") <= 1


def test_cache_rows() -> None:
    mine = torch.zeros(3, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
    expected, value = mine.clone(), torch.randn(3, 8, 5, 128, device="cuda")
    lengths = torch.tensor([0, 17, 59], device="cuda")
    cache_update_reference(expected, value, lengths, 2)
    cache_update_cuda(mine, value, lengths, 2)
    assert torch.equal(mine, expected)
