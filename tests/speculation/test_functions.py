"""Tensor functions beside the model: compiled or not, bound to tensors or not, they give the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accelc.functions import compile_function
from accelc.runtime.functions import Functions, put
from accelc.runtime.speculation.draft import Text

CALLS = {"as written": lambda: Functions(), "compiled": lambda: Functions(compile_function)}


@pytest.fixture(params=CALLS, ids=str)
def call(request: pytest.FixtureRequest) -> Functions:
    return CALLS[request.param]()


def summed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A result of its own, and one that is a view."""
    return a + b, (a * 2).squeeze(1)


def test_calls_with_the_same_tensors_read_them_anew(call: Functions) -> None:
    a, b = torch.arange(3).view(3, 1), torch.ones(3, 1, dtype=torch.int64)
    for _ in range(4):
        total, doubled = call(summed, a, b)
        assert total.tolist() == [[i + 1] for i in a.flatten().tolist()]
        assert doubled.tolist() == [2 * i for i in a.flatten().tolist()]
        a += 5


def test_what_changes_its_tensors_keeps_its_own_results(call: Functions) -> None:
    """Bound or not, two sets of tensors in turn."""
    sets = [(torch.full((2, 1), i), torch.full((2, 1), 10 * i)) for i in range(1, 4)]
    for _ in range(3):
        kept = [[tensor.clone() for tensor in call(summed, *given)] for given in sets for _ in range(2)]
        for place, (total, doubled) in enumerate(kept):
            value = place // 2 + 1
            assert total.tolist() == [[11 * value]] * 2
            assert doubled.tolist() == [2 * value] * 2


def test_releasing_lets_go_of_tensors() -> None:
    call = Functions(compile_function)
    a, b = torch.arange(3).view(3, 1), torch.ones(3, 1, dtype=torch.int64)
    first, second = call(summed, a, b)[0], call(summed, a, b)[0]
    again = call(summed, a, b)[0]
    assert again is second  # bound: the same memory
    assert again is not first
    call.release()
    assert call(summed, a, b)[0] is not again
    assert again.tolist() == [[1], [2], [3]]


def test_a_function_writes_into_its_buffers(call: Functions) -> None:
    def counted(count: Tensor, by: Tensor) -> tuple[Tensor]:
        more = count + by
        put(count, more)
        return (more,)

    count, by = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1], [3]])
    for turn in range(1, 5):
        (more,) = call(counted, count, by)
        assert count.tolist() == more.tolist() == [[turn], [3 * turn]]


def test_texts_grow_row_by_row(call: Functions) -> None:
    text = Text(torch.zeros(2, 16, dtype=torch.int64), torch.tensor([2, 1]), call)
    text.tokens[0, :2], text.tokens[1, :1] = torch.tensor([7, 8]), 9
    text = Text(text.tokens, text.lengths, call)
    assert text.root.tolist() == [[8], [9]]
    tokens, counts = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    whole: list[list[int]] = [[7, 8], [9]]
    for new, taken in (([[1, 2, 3], [4, 5, 6]], [2, 0]), ([[3, 9, 9], [4, -1, 6]], [1, 3]), ([[5, 5, 5]] * 2, [0, 1])):
        tokens.copy_(torch.tensor(new))
        counts.copy_(torch.tensor(taken))
        text.append(tokens, counts)
        for row in range(2):
            whole[row] += [max(t, 0) for t in new[row][: taken[row]]]
            assert text.tokens[row, : len(whole[row])].tolist() == whole[row]
        assert text.lengths.tolist() == [len(row) for row in whole]
        assert text.root.tolist() == [[row[-1]] for row in whole]
