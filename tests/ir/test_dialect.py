"""The dialect's operations against float64 loops that share nothing with the references, and against opcheck."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelc.ir.dialect import ACTIVATIONS, QUANTIZED, REFERENCES, UPDATES, key_positions, mask_family, visible
from accelc.ir.quantized import Scheme, encode

ops = torch.ops.accelc
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


# -- what may be seen, by definition ---------------------------------------------------------------------------------


def words_of(parents: list[int], words: int) -> Tensor:
    """Ancestor-or-self bitmasks [N, W] of a tree given by parents (-1: child of the committed prefix)."""
    table = torch.zeros(len(parents), words, dtype=torch.int64)
    for i in range(len(parents)):
        node = i
        while node >= 0:
            bit = node % 64
            table[i, node // 64] |= (1 << bit) - (1 << 64 if bit == 63 else 0)  # bit 63 is the sign of an int64
            node = parents[node]
    return table


def sees(i: int, slot: int, length: int, parents: list[int]) -> bool:
    """Whether new token i may see a slot: the definition, by walking up."""
    while slot >= length and i >= 0:
        if i == slot - length:
            return True
        i = parents[i]
    return slot < length


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    size = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 128]))
    return [draw(st.integers(-1, i - 1)) for i in range(size)]


@settings(max_examples=25, deadline=None)
@given(parents=trees(), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=2), spare=st.integers(0, 3))
def test_visible_in_trees(parents: list[int], lengths: list[int], spare: int) -> None:
    n, slots = len(parents), max(lengths) + len(parents) + spare
    tree = words_of(parents, (n + 63) // 64).expand(len(lengths), -1, -1)
    result = visible(torch.zeros(len(lengths), n, dtype=torch.int64), torch.tensor(lengths), tree, slots)
    expected = [[[sees(i, s, length, parents) for s in range(slots)] for i in range(n)] for length in lengths]
    assert result.tolist() == expected


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 70), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_a_chain_is_the_tree_of_single_children(n: int, lengths: list[int]) -> None:
    chain = words_of([i - 1 for i in range(n)], 2).expand(len(lengths), -1, -1)
    positions = torch.zeros(len(lengths), n, dtype=torch.int64)
    slots = max(lengths) + n + 1
    with_tree = visible(positions, torch.tensor(lengths), chain, slots)
    assert torch.equal(with_tree, visible(positions, torch.tensor(lengths), None, slots).expand_as(with_tree))


def test_key_positions() -> None:
    positions = torch.tensor([[5, 6, 6], [2, 3, 3]])  # two siblings at the end
    result = key_positions(positions, torch.tensor([5, 2]), 8)
    assert result.tolist() == [[0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 3, 3, 3, 3, 3]]


def test_mask_families() -> None:
    q, k = torch.tensor([[5, 6]]), torch.arange(7)[None]
    assert mask_family("causal", 0, q, k) is None
    assert mask_family("window", 2, q, k).tolist() == [[[p - s < 2 for s in range(7)] for p in (5, 6)]]
    assert mask_family("chunk", 3, q, k).tolist() == [[[p // 3 == s // 3 for s in range(7)] for p in (5, 6)]]
    with pytest.raises(ValueError, match="known: causal, window, chunk"):
        mask_family("diagonal", 0, q, k)


# -- attention -------------------------------------------------------------------------------------------------------


def attention_by_loops(
    q, k, v, positions, lengths, parents, bias, sinks, slopes, mask, window, scale, softcap
) -> Tensor:
    """The definition, one query at a time, in float64."""
    b, h, n, _ = q.shape
    group = h // k.shape[1]
    out = torch.zeros(b, h, n, v.shape[3], dtype=torch.float64)
    for r in range(b):
        length = int(lengths[r])
        for head in range(h):
            for i in range(n):
                scores, rows = [], []
                p = int(positions[r, i])
                for s in range(k.shape[2]):
                    if not sees(i, s, length, parents):
                        continue
                    t = s if s < length else int(positions[r, s - length])
                    if (mask == "window" and p - t >= window) or (mask == "chunk" and p // window != t // window):
                        continue
                    score = scale * float(q[r, head, i].double() @ k[r, head // group, s].double())
                    if softcap > 0:
                        score = softcap * math.tanh(score / softcap)
                    if slopes is not None:
                        score += float(slopes[head]) * (t - p)
                    if bias is not None:
                        entry = bias.expand(b, h, n, k.shape[2])[r, head, i, s]
                        if bias.dtype == torch.bool:
                            if not entry:
                                continue
                        else:
                            score += float(entry)
                    scores.append(score)
                    rows.append(v[r, head // group, s].double())
                extra = [float(sinks[head])] if sinks is not None else []
                top = max([*scores, *extra])
                total = sum(math.exp(x - top) for x in [*scores, *extra])
                out[r, head, i] = sum(math.exp(x - top) / total * row for x, row in zip(scores, rows))
    return out


CHAIN, TREE = [-1, 0, 1, 2], [-1, 0, 0, 2]


def attention_case(dtype: torch.dtype = torch.float32, **options) -> tuple[tuple, list[int]]:
    """Arguments of `accelc::attention` (B 2, H 4, Hk 2, N 4, S 11, D 8, Dv 6) and the parents of the tree."""
    parents = options.pop("parents", CHAIN)
    lengths = torch.tensor([6, 1])
    depth = [0] * 4
    for i, parent in enumerate(parents):
        depth[i] = depth[parent] + 1 if parent >= 0 else 0
    defaults = {
        "query": torch.randn(2, 4, 4, 8),
        "key": torch.randn(2, 2, 11, 8),
        "value": torch.randn(2, 2, 11, 6),
        "positions": lengths[:, None] + torch.tensor(depth),
        "lengths": lengths,
        "tree": None if parents is CHAIN else words_of(parents, 1).expand(2, -1, -1).contiguous(),
        "bias": None,
        "sinks": None,
        "slopes": None,
        "mask": "causal",
        "window": 0,
        "scale": 0.35,
        "softcap": 0.0,
    }
    arguments = {**defaults, **options}
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].to(dtype)
    return tuple(arguments.values()), parents


CASES = {
    "plain": {},
    "tree": {"parents": TREE},
    "window": {"mask": "window", "window": 3},
    "window in a tree": {"mask": "window", "window": 2, "parents": TREE},
    "chunk": {"mask": "chunk", "window": 4},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.06])},
    "slopes in a tree": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.06]), "parents": TREE},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "bias": {"bias": torch.linspace(-1, 1, 44).reshape(1, 1, 4, 11)},
    "bool bias": {"bias": (torch.arange(11) % 3 != 1).reshape(1, 1, 1, 11)},
    "everything": {
        "mask": "window",
        "window": 5,
        "softcap": 2.0,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "slopes": torch.tensor([0.5, 0.25, 0.125, 0.06]),
        "bias": torch.linspace(-1, 1, 88).reshape(2, 1, 4, 11),
        "parents": TREE,
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_attention(options: dict) -> None:
    arguments, parents = attention_case(**options)
    result = ops.attention(*arguments)
    expected = attention_by_loops(*arguments[:5], parents, *arguments[6:])
    torch.testing.assert_close(result.double(), expected, **ROUNDING)
    assert result.transpose(1, 2).is_contiguous()


def test_attention_in_half_precision_accumulates_in_float32() -> None:
    arguments, parents = attention_case(torch.bfloat16)
    expected = attention_by_loops(*arguments[:5], parents, *arguments[6:])
    result = ops.attention(*arguments)
    assert result.dtype is torch.bfloat16
    # One rounding to bfloat16 at the end, relative 2**-9, is all that may be lost.
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=2**-8)


def test_attention_of_strided_views() -> None:
    (query, key, value, *rest), _ = attention_case()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    torch.testing.assert_close(ops.attention(*strided, *rest), ops.attention(query, key, value, *rest))


@pytest.mark.parametrize("options", [{}, {"parents": TREE}, {"bias": torch.zeros(1, 1, 4, 11)}], ids=str)
def test_garbage_in_hidden_slots_is_harmless(options: dict) -> None:
    arguments, _ = attention_case(**options)
    clean = ops.attention(*arguments)
    _, key, value, _, lengths, *_ = arguments
    for row in range(2):
        key[row, :, int(lengths[row]) + 4 :] = float("nan")
        value[row, :, int(lengths[row]) + 4 :] = float("nan")
    assert torch.equal(ops.attention(*arguments), clean)


def test_full_attention_is_torch_attention() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    bias = torch.randn(2, 1, 5, 5)
    wide = [t.double().repeat_interleave(2, 1) if t is not q else t.double() for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=0.3)
    torch.testing.assert_close(ops.full_attention(q, k, v, None, None, True, 0.3, 0.0).double(), expected, **ROUNDING)
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=bias.double(), scale=0.3)
    torch.testing.assert_close(ops.full_attention(q, k, v, bias, None, False, 0.3, 0.0).double(), expected, **ROUNDING)


def test_full_attention_with_softcap_and_sinks() -> None:
    q, k, v, sinks = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6), torch.randn(2)
    arguments = (q, k, v, torch.arange(5)[None], torch.tensor([0]))
    expected = attention_by_loops(*arguments, [-1, 0, 1, 2, 3], None, sinks, None, "causal", 0, 0.3, 1.5)
    torch.testing.assert_close(ops.full_attention(q, k, v, None, sinks, True, 0.3, 1.5).double(), expected, **ROUNDING)


# -- the others --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "shape"), [(1, (2, 9, 3)), (2, (2, 3, 9, 4)), (3, (2, 3, 4, 9))])
def test_cache_update(dim: int, shape: tuple[int, ...]) -> None:
    cache = torch.randn(shape)
    value = torch.randn([3 if i == dim else n for i, n in enumerate(shape)])
    expected = cache.clone()
    for row, length in enumerate((2, 6)):
        for i in range(3):
            expected[row].select(dim - 1, length + i).copy_(value[row].select(dim - 1, i))
    ops.cache_update(cache, value, torch.tensor([2, 6]), dim)
    assert torch.equal(cache, expected)


def test_cache_update_casts_to_the_cache() -> None:
    cache, value = torch.zeros(1, 4, 2, dtype=torch.bfloat16), torch.randn(1, 2, 2)
    ops.cache_update(cache, value, torch.tensor([1]), 1)
    assert torch.equal(cache[:, 1:3], value.bfloat16())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype, offset: float) -> None:
    x, weight = (3 * torch.randn(2, 3, 8)).to(dtype), torch.randn(8)
    rows = [
        [e / math.sqrt(sum(f * f for f in row) / 8 + 1e-5) * (float(w) + offset) for e, w in zip(row, weight)]
        for row in x.double().reshape(-1, 8).tolist()
    ]
    result = ops.rms_norm(x, weight, 1e-5, offset)
    assert result.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(
        result.double(), torch.tensor(rows, dtype=torch.float64).reshape(2, 3, 8), atol=1e-6, rtol=tolerance
    )


def test_rms_norm_without_weight() -> None:
    x = torch.randn(2, 8)
    torch.testing.assert_close(ops.rms_norm(x, None, 1e-6, 0.0), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_complex_product(interleaved: bool) -> None:
    x, angles = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    repeat = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat([t, t], -1))
    result = ops.rotary(x, repeat(angles.cos()), repeat(angles.sin()), interleaved)
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(5, 4).double(), angles)
    )
    expected = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(result, expected)


FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_gated_activation(kind: str) -> None:
    gate, up = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[kind](g) * u for g, u in zip(gate.flatten().tolist(), up.flatten().tolist())])
    torch.testing.assert_close(
        ops.gated_activation(gate, up, kind), expected.double().reshape(4, 6), atol=1e-6, rtol=1e-6
    )


def test_top_k_by_definition() -> None:
    """The largest first, the first of equals first, NaN above all."""
    scores = torch.tensor([[1.0, 3.0, 3.0, -math.inf, 2.0], [0.0, 5.0, math.nan, 5.0, math.nan]])
    assert ops.top_k(scores, 3).tolist() == [[1, 2, 4], [2, 4, 1]]
    assert ops.top_k(scores, 1).tolist() == [[1], [2]]
    assert ops.top_k(scores, 5).tolist() == [[1, 2, 4, 0, 3], [2, 4, 1, 3, 0]]


def samples() -> dict[str, tuple]:
    lead = (2, 3, 4)
    draws = (
        torch.rand(lead) < 0.5,
        torch.rand(lead) + 0.5,
        torch.randint(9, lead),
        torch.rand(lead),
        torch.rand(lead) / 2,
    )
    plain, _ = attention_case()
    full, _ = attention_case(**CASES["everything"])
    x = torch.randn(2, 3, 4, 8)
    full_qkv = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    scales, zeros = torch.rand(20, 2) / 8 + 0.1, torch.full((20, 2), 7.0)
    coded = encode(torch.randn(20, 40), scales, zeros, Scheme(4, 32, symmetric=False, scale_dtype=torch.float32))
    weight = (coded.codes, coded.scales, coded.zeros)
    return {
        "attention": plain,
        "attention with everything": full,
        "full_attention": (*full_qkv, torch.randn(2, 1, 5, 5), torch.randn(4), True, 0.3, 1.5),
        "key_positions": (*plain[3:5], 11),
        "visible": (*full[3:6], 11),
        "visible in a chain": (*plain[3:6], 11),
        "cache_update": (torch.zeros(2, 3, 9, 4), torch.randn(2, 3, 2, 4), torch.tensor([1, 5]), 2),
        "scatter_rows": (torch.zeros(5, 4), torch.tensor([3, 0]), torch.randn(2, 4)),
        "rms_norm": (x.transpose(1, 2), torch.randn(8), 1e-5, 1.0),
        "rotary": (x.transpose(1, 2).bfloat16(), torch.randn(3, 8), torch.randn(3, 8), True),
        "gated_activation": (x.transpose(1, 2), x.transpose(1, 2), "silu"),
        "top_k": (x.transpose(1, 2), 3),
        "top_k of one": (x, 1),
        "draw_token": (x, *draws, torch.rand(lead, dtype=torch.float64)),
        "dequantize": (*weight, 4, 20, 40, torch.bfloat16),
        "quantized_linear": (torch.randn(3, 2, 40).transpose(0, 1), *weight, torch.randn(20), 4, 20),
        "quantized_grouped_linear": (
            torch.randn(7, 40),
            *(torch.stack([part, part.flip(0)]) for part in weight),
            torch.tensor([3, 6]),
            4,
            20,
        ),
        "quantized_embedding": (torch.tensor([[3, 19], [0, 3]]), *weight, 4, 40, torch.float32),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name.split()[0]).default, samples()[name], test_utils=CHECKS)


def test_every_operation_of_the_dialect_is_tested() -> None:
    named = {op.name().removeprefix("accelc::") for op in {**REFERENCES, **QUANTIZED, **dict.fromkeys(UPDATES)}} | {
        "draw_token"
    }
    assert named == {name.split()[0] for name in samples()}


@pytest.mark.parametrize("name", sorted(set(samples()) - {"cache_update", "scatter_rows", "draw_token"}))
def test_references_are_what_the_operations_compute(name: str) -> None:
    """Code generation expands operations to their references; kernels for quantized weights round activations."""
    operation = getattr(ops, name.split()[0]).default
    arguments = samples()[name]
    expected = {**REFERENCES, **QUANTIZED}[operation](*arguments)
    rounding = {"atol": 1e-3, "rtol": 1e-3} if operation in QUANTIZED else {}
    torch.testing.assert_close(operation(*arguments), expected, **rounding)
