"""The attention kernel against the dialect's reference in float64: every mask family and term, any layout."""

from __future__ import annotations

import pytest
import torch
from codegen_single import run_single
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelc.ir.dialect import attention_reference

OP = torch.ops.accelc.attention.default
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random_tree(batch: int, nodes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ancestor words [B, N, W] of random trees, and depths [B, N]."""
    words = torch.zeros(batch, nodes, (nodes + 63) // 64, dtype=torch.int64)
    depth = torch.zeros(batch, nodes, dtype=torch.int64)
    for b in range(batch):
        for i in range(nodes):
            parent = int(torch.randint(-1, i, (1,), generator=generator)) if i else -1
            if parent >= 0:
                words[b, i] = words[b, parent]
                depth[b, i] = depth[b, parent] + 1
            bit = i % 64
            words[b, i, i // 64] |= -(1 << 63) if bit == 63 else 1 << bit
    return words, depth


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 5]))
    fresh = draw(st.sampled_from([1, 2, 7, 33, 70]))
    return {
        "batch": draw(st.integers(1, 3)),
        "heads": heads,
        "kv_heads": kv_heads,
        "fresh": fresh,
        "dim": draw(st.sampled_from([3, 16, 40, 64, 80])),
        "dim_v": draw(st.sampled_from([5, 16, 64, 72])),
        "longest": draw(st.sampled_from([1, 60, 300, 900])),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "tree": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, "full", "heads", "bool"])),
        "sinks": draw(st.booleans()),
        "slopes": draw(st.booleans()),
        "mask": draw(st.sampled_from([("causal", 0), ("window", 1), ("window", 50), ("chunk", 32)])),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "swap": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def build(case) -> tuple:
    g = torch.Generator().manual_seed(case["seed"])
    b, h, hk, n, d, dv = (case[k] for k in ("batch", "heads", "kv_heads", "fresh", "dim", "dim_v"))
    dtype = case["dtype"]
    slots = case["longest"] + n + 3
    lengths = torch.randint(0, case["longest"] + 1, (b,), generator=g)

    def normal(*size):
        return torch.empty(size).normal_(generator=g).to(dtype)

    query, key, value = normal(b, h, n, d), normal(b, hk, slots, d), normal(b, hk, slots, dv)
    for row in range(b):  # what lies beyond the new tokens is garbage, and may be NaN
        key[row, :, lengths[row] + n :] = float("nan")
        value[row, :, lengths[row] + n :] = float("nan")
    tree, depth = (None, torch.arange(n).expand(b, n))
    if case["tree"]:
        tree, depth = random_tree(b, n, g)
    positions = (lengths[:, None] + depth).contiguous()
    bias = {
        None: lambda: None,
        "full": lambda: normal(b, h, n, slots),
        "heads": lambda: normal(1, h, 1, slots),
        "bool": lambda: torch.rand(b, 1, n, slots, generator=g) > 0.2,
    }[case["bias"]]()
    if case["bias"] == "bool":  # every token sees itself, so that no row is empty
        for row in range(b):
            for i in range(n):
                bias[row, 0, i, lengths[row] + i] = True
    sinks = normal(h) if case["sinks"] else None
    slopes = torch.rand(h, generator=g) if case["slopes"] else None
    mask, window = case["mask"]
    terms = (tree, bias, sinks, slopes, mask, window, d**-0.5, case["softcap"])
    return (query, key, value, positions, lengths, *terms)


def expected(args) -> torch.Tensor:
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    # The reference multiplies hidden scores by zero probabilities: take the garbage out of its way.
    wide[1], wide[2] = wide[1].nan_to_num(0.0), wide[2].nan_to_num(0.0)
    return attention_reference(*wide)


def compare(args, dtype, **how) -> None:
    got = run_single(OP, *args, **how)
    want = expected(args)
    assert got.dtype == dtype
    assert got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_matches_reference(case) -> None:
    compare(build(case), case["dtype"], view={1: (1, 2), 2: (1, 2)} if case["swap"] else None)


BASE = {
    "batch": 2, "heads": 4, "kv_heads": 2, "fresh": 7, "dim": 40, "dim_v": 24, "longest": 300, "tree": True,
    "bias": "full", "sinks": True, "slopes": True, "mask": ("window", 50), "softcap": 3.0, "swap": False, "seed": 7,
}  # fmt: skip


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 processor")
def test_other_instruction_sets(march: str, dtype: torch.dtype) -> None:
    compare(build({**BASE, "dtype": dtype}), dtype, march=march)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_split_context_at_any_number_of_threads(threads: int) -> None:
    case = {
        **BASE,
        "batch": 1,
        "heads": 2,
        "kv_heads": 1,
        "fresh": 1,
        "tree": False,
        "longest": 4000,
        "mask": ("causal", 0),
    }
    args = list(build({**case, "bias": None, "dtype": torch.float32}))
    args[4][0] = 3990
    args[3][0] = 3990
    args[1], args[2] = args[1].nan_to_num(0.5), args[2].nan_to_num(0.5)
    compare(tuple(args), torch.float32, threads=threads)


def test_negative_control() -> None:
    """The comparison notices a window of another width."""
    args = list(build({**BASE, "dtype": torch.float32}))
    args[10] -= 40
    got, want = run_single(OP, *args), expected(build({**BASE, "dtype": torch.float32}))
    assert (got.double() - want).abs().max() > 1e-3
