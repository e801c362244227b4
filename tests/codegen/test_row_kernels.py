"""Norms, rotary, element-wise operations, gathers and cache writes against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from codegen_single import run_single, single
from hypothesis import given, settings
from hypothesis import strategies as st

from accelc.codegen import CompiledStep, Options
from accelc.codegen.errors import StepIndexError
from accelc.ir.dialect import (
    ACTIVATIONS,
    gated_activation_reference,
    rms_norm_reference,
    rotary_reference,
    top_k_reference,
)

aten, ops = torch.ops.aten, torch.ops.accelc
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
dtypes = st.sampled_from(list(TOLERANCE))
sizes = st.lists(st.integers(1, 6), min_size=0, max_size=3)
lasts = st.sampled_from([1, 2, 15, 16, 17, 64, 100])
quick = settings(max_examples=40, deadline=None, derandomize=True)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@quick
@given(lead=sizes, last=lasts, dtype=dtypes, weight=st.booleans(), offset=st.sampled_from([0.0, 1.0]))
def test_rms_norm(lead, last, dtype, weight, offset) -> None:
    x, w = torch.randn(*lead, last).to(dtype), torch.randn(last).to(dtype) if weight else None
    got = run_single(ops.rms_norm.default, x, w, 1e-5, offset)
    close(got, rms_norm_reference(x.double(), None if w is None else w.double(), 1e-5, offset), dtype)


@quick
@given(lead=sizes, last=lasts, dtype=dtypes, weight=st.booleans(), bias=st.booleans())
def test_layer_norm(lead, last, dtype, weight, bias) -> None:
    x = (3 + torch.randn(*lead, last)).to(dtype)
    w, b = (torch.randn(last).to(dtype) if wanted else None for wanted in (weight, bias))
    got = run_single(aten.layer_norm.default, x, [last], w, b, 1e-5)
    close(got, F.layer_norm(x.double(), (last,), *(None if t is None else t.double() for t in (w, b))), dtype)


@quick
@given(dim=st.sampled_from([2, 16, 20, 64]), dtype=dtypes, interleaved=st.booleans(), swap=st.booleans())
def test_rotary(dim, dtype, interleaved, swap) -> None:
    x, cos, sin = (
        torch.randn(2, 3, 5, dim).to(dtype),
        torch.randn(2, 1, 5, dim).to(dtype),
        torch.randn(2, 1, 5, dim).to(dtype),
    )
    got = run_single(ops.rotary.default, x, cos, sin, interleaved, view={0: (1, 2)} if swap else None)
    close(got, rotary_reference(x.double(), cos.double(), sin.double(), interleaved), dtype)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_activation(kind: str, dtype: torch.dtype) -> None:
    gate, up = (4 * torch.randn(3, 2100)).to(dtype), torch.randn(3, 2100).to(dtype)
    close(
        run_single(ops.gated_activation.default, gate, up, kind),
        gated_activation_reference(gate.double(), up.double(), kind),
        dtype,
    )


EXTREMES = torch.tensor([0.0, -0.0, 1e-30, 1e-4, 0.5, 1, 4, 8, 20, 88, 89, 104, 1e4, float("inf"), float("nan")])


@pytest.mark.parametrize("name", ["neg", "exp", "silu", "sigmoid", "tanh", "relu", "rsqrt", "gelu"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unary_over_the_whole_range(name: str, dtype: torch.dtype) -> None:
    x = torch.cat([EXTREMES, -EXTREMES, torch.linspace(-30, 30, 999)]).to(dtype)
    if name in ("silu", "gelu"):
        x = x[~x.isinf()]  # -inf * 0 is NaN in one order of evaluation and 0 in another
    function = getattr(aten, name).default
    want = function(x.float()).to(dtype).double()
    got = run_single(function, x).double()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=TOLERANCE[dtype], equal_nan=True)


@quick
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    dtype=dtypes,
    name=st.sampled_from(["add", "sub", "mul", "div"]),
    number=st.booleans(),
)
def test_binary_broadcast(shape, data, dtype, name, number) -> None:
    other_shape = [n if data.draw(st.booleans()) else 1 for n in shape]
    a = torch.randn(*shape).to(dtype)
    b = 1.5 if number else (2 + torch.rand(*other_shape)).to(dtype)
    function = getattr(aten, name).Tensor
    view = {0: (0, -1)} if len(shape) > 1 else None
    close(run_single(function, a, b, view=view), function(a.double(), b if number else b.double()), dtype)


def test_mixed_dtypes_promote() -> None:
    a, b = torch.randn(4, 9).bfloat16(), torch.randn(9)
    got = run_single(aten.mul.Tensor, a, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, a.float() * b)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.int64])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dtype: torch.dtype, dim: int) -> None:
    from torch import fx

    graph = fx.Graph()
    parts = [graph.placeholder(n) for n in "abc"]
    graph.output((graph.call_function(aten.cat.default, (parts, dim)),))
    inputs = [torch.randint(0, 99, (2, 3, 4)).to(dtype) for _ in "abc"]
    step = CompiledStep(fx.GraphModule(torch.nn.Module(), graph), inputs, {}, Options())
    assert not step.report.foreign
    assert torch.equal(step(*inputs)[0], torch.cat(inputs, dim))


def test_embedding_and_index() -> None:
    table, ids = torch.randn(11, 5).bfloat16(), torch.tensor([[0, 10], [3, 3]])
    assert torch.equal(run_single(aten.embedding.default, table, ids), table[ids])
    with pytest.raises(StepIndexError):
        run_single(aten.embedding.default, table, torch.tensor([11]))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32), (torch.int8,) * 2]
)
def test_cache_update(dim: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    from torch import fx

    size, new = [3, 4, 5, 6], [3, 4, 5, 6]
    size[dim], new[dim] = 20, 2
    cache, value = torch.randn(size).mul(50).to(dtypes[0]), torch.randn(new).mul(50).to(dtypes[1])
    lengths = torch.tensor([0, 7, 18])
    graph = fx.Graph()
    c, v, n = (graph.placeholder(x) for x in "cvn")
    graph.call_function(ops.cache_update.default, (c, v, n, dim))
    graph.output((c,))
    step = CompiledStep(fx.GraphModule(torch.nn.Module(), graph), [cache, value, lengths], {}, Options())
    assert not step.report.foreign
    want = cache.clone()
    for b in range(3):
        want[b].narrow(dim - 1, int(lengths[b]), 2).copy_(value[b])
    (got,) = step(cache, value, lengths)
    assert torch.equal(cache, want)
    assert got.data_ptr() == cache.data_ptr()
    with pytest.raises(StepIndexError):
        step(cache, value, torch.tensor([0, 0, 19]))


def test_operations_without_a_kernel_are_left_to_torch() -> None:
    gm, inputs = single(aten.sort.default, (torch.randn(3, 4).double(),))
    graph = gm.graph
    result = next(n for n in graph.nodes if n.op == "call_function")
    with graph.inserting_after(result):
        import operator

        first = graph.call_function(operator.getitem, (result, 0))
    graph.output_node().args = ((first,),)
    step = CompiledStep(gm, inputs, {}, Options())
    assert step.report.regions == 1
    assert torch.equal(step(*inputs)[0], inputs[0].sort().values)


@quick
@given(
    lead=st.lists(st.integers(1, 4), min_size=0, max_size=2), last=st.sampled_from([1, 2, 7, 16, 17, 100, 999]),
    k=st.integers(1, 12), dtype=dtypes, levels=st.sampled_from([2, 5, 10**6]), nan=st.booleans(),
)  # fmt: skip
def test_top_k(lead, last, k, dtype, levels, nan) -> None:
    """Ties by their place, as a stable sort has them; NaN above all."""
    scores = (torch.randint(-levels, levels, (*lead, last)) / 7).to(dtype)
    scores[scores == 0] = -torch.inf
    if nan:
        scores.view(-1)[:: max(2, last // 3)] = torch.nan
    k = min(k, last)
    got = run_single(ops.top_k.default, scores, k)
    assert torch.equal(got, top_k_reference(scores.float(), k))
    assert torch.equal(got, ops.top_k(scores, k))
