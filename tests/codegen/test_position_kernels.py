"""Kernels for positions, masks, look-ups and small products against torch."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from codegen_single import run_single, single
from torch import Tensor

from accelc.codegen import CompiledStep, Options
from accelc.codegen.errors import StepIndexError

aten, ops = torch.ops.aten, torch.ops.accelc


def integers(*shape: int) -> Tensor:
    return torch.randint(-9, 9, shape)


def truth(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


COMPARED = [getattr(aten, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")]
LOGICAL = [aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor]
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    **{f"{op.__name__} tensor": (op.Tensor, (integers(3, 1, 700), integers(2, 1))) for op in COMPARED},
    **{f"{op.__name__} number": (op.Scalar, (torch.randn(5, 7), 0.5)) for op in COMPARED},
    **{f"{op.__name__} bool": (op.Tensor, (truth(3, 1), truth(3, 5))) for op in LOGICAL},
    **{f"{op.__name__} bits": (op.Tensor, (integers(3, 1), integers(3, 5))) for op in LOGICAL},
    "large integers stay exact": (aten.eq.Scalar, (torch.tensor([2**60, 2**60 + 1]), 2**60)),
    "add": (aten.add.Tensor, (integers(4, 1), integers(4, 3))),
    "sub": (aten.sub.Tensor, (integers(4, 1), integers(4, 3))),
    "integer and float": (aten.add.Tensor, (integers(4, 3), torch.randn(4, 3))),
    "floor_divide": (aten.floor_divide.default, (integers(4, 3), 4)),
    "floor_divide negative": (aten.floor_divide.default, (integers(4, 3), -4)),
    "remainder": (aten.remainder.Scalar, (integers(4, 3), 4)),
    "logical_not": (aten.logical_not.default, (integers(4, 3),)),
    "bitwise_not": (aten.bitwise_not.default, (truth(4, 3),)),
    "bitwise_not bits": (aten.bitwise_not.default, (integers(4, 3),)),
    "clamp": (aten.clamp.default, (integers(4, 3), -2, 5)),
    "clamp below": (aten.clamp.default, (integers(4, 3), -2)),
    "clamp float": (aten.clamp.default, (torch.tensor([-3.0, float("nan"), 9.0, float("inf")]), -1.5, 7.0)),
    "where": (aten.where.self, (truth(3, 1, 5), torch.randn(2, 1), torch.tensor(0.25))),
    "masked_fill": (aten.masked_fill.Scalar, (torch.randn(2, 3, 5), truth(3, 1), float("-inf"))),
    "to float": (aten._to_copy.default, (truth(2, 3),)),
    "index rows": (aten.index.Tensor, (torch.randn(7, 1, 3), [torch.tensor([[0, -1], [6, 2]])])),
    "index pairs": (aten.index.Tensor, (torch.randn(2, 5, 3), [torch.tensor([0, 1]), torch.tensor([4, 0])])),
    "index inside": (aten.index.Tensor, (torch.randn(2, 5, 3), [None, torch.tensor([4, 0])])),
    "gather": (aten.gather.default, (torch.randn(4, 6), -1, torch.tensor([[0, 5], [1, 1], [2, 3], [5, 4]]))),
    "index_select": (aten.index_select.default, (torch.randn(4, 6), 1, torch.tensor([3, 3, 0]))),
    "stack": (aten.stack.default, ([torch.randn(2, 3), torch.randn(2, 3)], 1)),
    "repeat": (aten.repeat.default, (torch.randn(2, 3), [4, 1, 2])),
    "softmax": (aten.softmax.int, (torch.randn(3, 4, 9), -1)),
    "softmax inside": (aten.softmax.int, (torch.randn(3, 4, 9), 1)),
    "softmax of a hidden row": (aten.softmax.int, (torch.full((2, 3), float("-inf")), -1)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str) -> None:
    target, args = CASES[case]
    if case == "to float":
        graph, tensors = single(target, args)
        node = next(n for n in graph.graph.nodes if n.op == "call_function")
        node.kwargs = {"dtype": torch.float32}
        step = CompiledStep(graph, tensors, {}, Options())
        got, want = step(*tensors)[0], args[0].float()
    else:
        got, want = run_single(target, *args), target(*args)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [7, -8])
def test_index_outside_its_table_is_named(bad: int) -> None:
    with pytest.raises(StepIndexError, match="outside its table"):
        run_single(aten.index.Tensor, torch.randn(7, 3), [torch.tensor([0, bad])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("width", [5, 64, 1500])
def test_product_with_a_weight_stored_k_by_n(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((rows, 70), (70, width), (width,)))
    got, want = run_single(aten.addmm.default, bias, x, weight), bias.double() + x.double() @ weight.double()
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("x", "matrix"),
    [
        ((2, 3, 5, 7), (2, 3, 7, 11)),
        ((2, 3, 5, 7), (3, 7, 11)),  # one matrix a head, as absorbed projections have it
        ((2, 5, 7), (7, 11)),
        ((2, 3, 20, 7), (3, 7, 11)),  # many rows: torch's product where the batch merges, ours where it does not
        ((6, 20, 7), (6, 7, 11)),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul(x: tuple[int, ...], matrix: tuple[int, ...], transposed: bool) -> None:
    a, b = torch.randn(x), torch.randn(matrix)
    got = run_single(aten.matmul.default, a, b, view={1: (-1, -2)} if transposed else None)
    torch.testing.assert_close(got, a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tree", [False, True])
def test_what_a_token_sees(tree: bool) -> None:
    from accelc.ir import dialect

    positions, lengths = torch.tensor([[3, 4, 4], [0, 1, 2]]), torch.tensor([3, 0])
    words = torch.tensor([[1, 3, 5], [1, 3, 7]])[:, :, None] if tree else None
    got = run_single(ops.visible.default, positions, lengths, words, 8)
    assert torch.equal(got, dialect.visible(positions, lengths, words, 8))
    got = run_single(ops.key_positions.default, positions, lengths, 8)
    assert torch.equal(got, dialect.key_positions(positions, lengths, 8))


def test_values_of_sizes_alone_are_computed_once() -> None:
    """A table made in the program from numbers is a constant of the plan; one that is returned is made anew."""
    from torch import fx

    graph = fx.Graph()
    x = graph.placeholder("x")
    row = graph.call_function(aten.arange.default, (graph.call_function(aten.sym_size.int, (x, 0)),))
    column = graph.call_function(aten.unsqueeze.default, (graph.call_function(aten.mul.Tensor, (row, 2)), 1))
    own = graph.call_function(aten.full.default, ([3], 7.0))
    graph.output((graph.call_function(aten.add.Tensor, (x, column)), own))
    step = CompiledStep(fx.GraphModule(torch.nn.Module(), graph), [torch.ones(2, 3)], {"x": {0: "B"}}, Options())
    assert dict(step.report.native) == {"aten.add.Tensor": 1}
    assert dict(step.report.eager) == {"aten.full.default": 1}
    for rows in (2, 5):
        x = torch.randn(rows, 3)
        got, made = step(x)
        torch.testing.assert_close(got, x + 2 * torch.arange(rows)[:, None])
        assert operator.is_not(made, step(x)[1])
        assert torch.equal(made, torch.full([3], 7.0))
