"""Times of products on a GPU, as they are inside a model: launched by a graph, weights read from memory."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import TiledWeight

CACHES = 3.0
"""Copies of a weight take this many times the second-level cache."""
FEWEST = 4
ALLOWED = 2.0**-6
"""Of the largest output: what rounding to bf16, of the output and of nothing else, may lose, twice over."""


def copies(nbytes: int) -> int:
    """How many copies of `nbytes` do not fit into the second-level cache by far."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(FEWEST, int(CACHES * cache / max(nbytes, 1)) + 1)


def copies_beyond_the_cache(weight: TiledWeight) -> list[TiledWeight]:
    """The weight and copies of it, of which each is read from memory when they are read in turn."""
    more = (
        dataclasses.replace(
            weight,
            codes=weight.codes.clone(),
            scales=weight.scales.clone(),
            zeros=None if weight.zeros is None else weight.zeros.clone(),
        )
        for _ in range(copies(weight.nbytes) - 1)
    )
    return [weight, *more]


def what_is_wrong(results: Sequence[Tensor], want: Tensor, allowed: float = ALLOWED) -> str:
    """What is wrong with results of one product computed several times, as text; empty if nothing is. ``allowed``: of
    the largest output.
    """
    if any(not torch.equal(result, results[0]) for result in results[1:]):
        return "its results differ from one run to the next"
    largest = want.abs().max().clamp(min=torch.finfo(want.dtype).tiny)
    error = float((results[0].to(want.dtype) - want).abs().max() / largest)
    return "" if error < allowed else f"its result is off by {error:.1%} of the largest output"


def seconds_in_a_graph(products: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Seconds of one product, all of `products` in turn in a captured graph: the median of replays.

    Launched one by one from Python, a product of a few microseconds would wait for the next launch.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles and tunes what is tuned at the first calls
            for product in products:
                product()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    for _ in range(2):
        graph.replay()
    return statistics.median(seconds_of(graph.replay) for _ in range(replays)) / len(products)


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds on the device, by its own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
