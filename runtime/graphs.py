"""Calls that are made again with the same tensors, as CUDA graphs: one launch in place of hundreds.

A graph is captured when a call is made for the second time: the first one tunes and loads what it needs. It reads and
writes the tensors that the call did, and returns the same objects each time, written anew. What cannot be captured is
called as before, and said so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from accelc.ir.errors import first_line

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Capture = Callable[[Callable[[], Any], Any], tuple[Callable[[], object], Any]]
"""capture(call, pool): what launches the call again, and what it returns each time."""


def cuda_graph(call: Callable[[], Result], pool: Any) -> tuple[Callable[[], object], Result]:
    """A call as a CUDA graph, which has not run yet. Raises RuntimeError for what cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = call()
        except BaseException:
            _end_broken(graph)
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result


def _end_broken(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture in which something raised; the current stream is the one that is captured."""
    try:
        graph.capture_end()
    except RuntimeError:
        log.debug("the end of a broken capture", exc_info=True)
    # torch's random numbers wait for a capture that ends well (seen with torch 2.11): an empty one does.
    empty = torch.cuda.CUDAGraph()
    try:
        empty.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        empty.capture_end()
    except RuntimeError:
        log.debug("no capture after a broken one", exc_info=True)


class Graphs:
    """The graphs of one decoder: they share their memory, as one of them runs at a time."""

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        self._capture = capture or (cuda_graph if device.type == "cuda" else None)
        self._pool: Any = None
        self.notice = ""
        """Why calls are no longer captured; empty as long as they are."""

    def again(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """The call, for a caller that makes it often: with the same tensors, without reading values on the host."""
        return call if self._capture is None else _Again(self, call)

    def captured(self, call: Callable[[], Result]) -> tuple[Callable[[], object], Result] | None:
        """A call as a graph; None, and a notice, where that is not possible."""
        if self.notice or self._capture is None:
            return None
        try:
            if self._pool is None and self._capture is cuda_graph:
                self._pool = torch.cuda.graph_pool_handle()
            return self._capture(call, self._pool)
        except RuntimeError as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            self.notice = f"steps are not captured as a graph and run node by node: {why}"
            log.warning(self.notice)
            return None


class _Again:
    def __init__(self, graphs: Graphs, call: Callable[[], Any]) -> None:
        self._graphs, self._call = graphs, call
        self._calls = 0
        self._replay: Callable[[], object] | None = None
        self._result: Any = None

    def __call__(self) -> Any:
        if self._replay is None:
            self._calls += 1
            if self._calls != 2:
                return self._call()
            if (made := self._graphs.captured(self._call)) is None:
                return self._call()
            self._replay, self._result = made
        self._replay()
        return self._result
