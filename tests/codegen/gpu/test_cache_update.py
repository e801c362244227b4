"""New rows of a cache by the Triton kernel, interpreted."""

from __future__ import annotations

import torch
from codegen_gpu import interpreted_launches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelc.codegen.gpu import cache, cache_kernels
from accelc.codegen.gpu.cache import cache_update_gpu, takes
from accelc.ir.dialect import cache_update_reference

_interpreted = interpreted_launches((cache_kernels, cache))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), n=st.integers(1, 4), heads=st.integers(1, 3),
    row=st.sampled_from([1, 5, 16, 80]), dim=st.sampled_from([1, 2]), turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64]),
)  # fmt: skip
def test_rows_land_behind_the_lengths(
    lengths: list[int], n: int, heads: int, row: int, dim: int, turned: bool, dtype: torch.dtype
) -> None:
    b, slots = len(lengths), 14
    shape = (b, heads, slots, row) if dim == 2 else (b, slots, row)
    new = (b, heads, n, row) if dim == 2 else (b, n, row)
    mine = torch.randint(-9, 9, shape).to(dtype)
    expected, value = mine.clone(), torch.randint(-9, 9, new).to(dtype)
    if turned:
        value = value.transpose(0, -1).contiguous().transpose(0, -1)
    cache_update_reference(expected, value, torch.tensor(lengths), dim)
    assert takes(mine, dim)
    cache_update_gpu(mine, value, torch.tensor(lengths), dim)
    assert torch.equal(mine, expected)


def test_what_the_kernel_does_not_write_to() -> None:
    assert not takes(torch.zeros(2, 3, 8, 4).transpose(1, 2), 1)
    assert not takes(torch.zeros(1, 4, 1 << 15), 1)
