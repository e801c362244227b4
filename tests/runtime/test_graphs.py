"""Calls that become graphs: when, what they return, and what happens where they cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelc.runtime.graphs import Graphs


class Device:
    """Stands in for CUDA: records what a call returns when it is captured, and says how often it was launched."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.captures, self.launches = error, 0, 0

    def __call__(self, call: Callable[[], Any], pool: Any) -> tuple[Callable[[], object], Any]:
        self.captures += 1
        if self.error is not None:
            raise self.error

        def replay() -> None:
            self.launches += 1

        return replay, call()


def counting() -> tuple[Callable[[], list[int]], list[int]]:
    calls: list[int] = []

    def call() -> list[int]:
        calls.append(len(calls))
        return [len(calls)]

    return call, calls


def test_the_second_call_is_captured_and_later_ones_launch_it() -> None:
    device = Device()
    call, calls = counting()
    again = Graphs(torch.device("cpu"), device).again(call)
    first = again()
    results = [again() for _ in range(4)]
    assert len(calls) == 2
    assert (device.captures, device.launches) == (1, 4)
    assert all(result is results[0] for result in results)
    assert first is not results[0]


def test_what_cannot_be_captured_is_called_and_said_so_once(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(RuntimeError("operation not permitted when stream is capturing\nmore of it"))
    graphs = Graphs(torch.device("cpu"), device)
    made = [counting() for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for call, _ in made:
            again = graphs.again(call)
            assert [again() for _ in range(4)] == [[1], [2], [3], [4]]
    assert device.captures == 1
    assert len(caplog.records) == 1
    assert "not permitted when stream is capturing" in graphs.notice
    assert "more of it" not in graphs.notice


def test_errors_of_the_call_itself_pass() -> None:
    class Stop(BaseException):
        pass

    def stopped() -> None:
        raise Stop

    graphs = Graphs(torch.device("cpu"), Device())
    with pytest.raises(Stop):
        graphs.again(stopped)()
    assert not graphs.notice


def test_without_a_gpu_calls_stay_as_they_are() -> None:
    call, _ = counting()
    assert Graphs(torch.device("cpu")).again(call) is call
