"""The measure of difference behind `verify`."""

import math

import pytest
import torch

from accelc.passes.verify import difference

INF, NAN = math.inf, math.nan


def test_errors_are_absolute_and_relative_to_the_largest_magnitude() -> None:
    result = difference("x", torch.tensor([1.0, -4.0, 0.5]), torch.tensor([1.0, -4.0, 0.25]))
    assert (result.absolute, result.relative) == (0.25, 0.0625)
    assert not result.passed
    assert difference("x", torch.tensor([1.0]), torch.tensor([1.00001])).passed


def test_integers_have_to_be_equal() -> None:
    assert difference("x", torch.tensor([3]), torch.tensor([3])).passed
    assert not difference("x", torch.tensor([3_000_000]), torch.tensor([3_000_001])).passed


@pytest.mark.parametrize(
    ("result", "reference", "passed"),
    [
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, -INF], [1.0, INF], False),
        ([1.0, NAN], [1.0, INF], False),
        ([1.0, NAN], [1.0, 1.0], False),
        ([1.0, 1.0], [1.0, NAN], False),
        ([NAN, NAN], [NAN, NAN], True),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 1.0], [0.0, 0.0], False),
    ],
)
def test_entries_that_are_not_finite(result: list[float], reference: list[float], passed: bool) -> None:
    assert difference("x", torch.tensor(result), torch.tensor(reference)).passed is passed


def test_shape_and_dtype_count() -> None:
    assert "shape [1, 2], was [2]" in str(difference("x", torch.zeros(1, 2), torch.zeros(2)))
    assert "dtype torch.float64" in str(difference("x", torch.zeros(2).double(), torch.zeros(2)))


def test_empty_tensors_are_equal() -> None:
    assert difference("x", torch.zeros(0, 3), torch.zeros(0, 3)).passed
