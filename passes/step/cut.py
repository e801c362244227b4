"""What to cache: a minimum cut between token-wise work and the operations that mix tokens.

Every value wanted in Key can be cached (its bytes are read for every past token at every step) or computed for all past
tokens from its inputs in Key (arithmetic, and bytes moved). Needing a value, and computing it, are the two sides of a
cut:

    source --compute cost--> computed(v) --bytes read--> needed(v) --inf--> sink, where a mixing operation demands v
    needed(input of v) --inf--> computed(v)

The same formulation picks what to recompute in training (torch's rematerialising partitioner). The minimum cut is the
choice with the least modelled time a past token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import networkx as nx
import torch
import torch.fx as fx

from accelc.ir.errors import DeriveError
from accelc.passes.step.analysis import Analysis
from accelc.passes.step.wants import Call, Want

aten = torch.ops.aten


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, for weighing bytes against arithmetic."""

    bytes: float = 40e9
    flops: float = 100e9


@dataclass(frozen=True)
class Cached:
    """One value chosen to be cached."""

    want: Want
    bytes_per_token: int


VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.permute, aten.transpose, aten.unsqueeze, aten.squeeze,
    aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.clone, aten.contiguous,
    aten.t, aten.repeat, aten.repeat_interleave,
}  # fmt: skip
"""Operations that move no bytes when fused into their consumer."""

CONTRACTIONS = {
    aten.linear, aten.matmul, aten.bmm, aten.mm, aten.addmm, aten.baddbmm, aten.einsum,
    torch.ops.accelc.quantized_linear,
}  # fmt: skip

IN_CACHE = 0.25
"""What a byte costs that is written and read again at once, as a share of one from memory: it stays in a processor
cache.
"""

TIE = 1e-15
"""Seconds added to every recomputation, so that among equal cuts the one nearest the mixing operation wins."""


def minimum_cut(
    analysis: Analysis, calls: dict[Want, Call | DeriveError], sinks: list[Want], rates: Rates
) -> list[Cached]:
    """The Key wants to cache, so that every sink is available at least modelled time.

    `calls` has every Key want reachable from the sinks, with how it is computed, or why it cannot be.
    """
    graph = nx.DiGraph()
    infinite = float("inf")
    for want, call in calls.items():
        stored = cached_bytes(analysis, want)
        graph.add_edge(
            ("computed", want), ("needed", want), capacity=infinite if stored is None else stored / rates.bytes
        )
        price = infinite if isinstance(call, DeriveError) else compute_time(analysis, want, call, rates)
        graph.add_edge("source", ("computed", want), capacity=price)
        if isinstance(call, Call):
            for needed in call.wants():
                if needed in calls:
                    graph.add_edge(("needed", needed), ("computed", want), capacity=infinite)
    for sink in sinks:
        graph.add_edge(("needed", sink), "sink", capacity=infinite)
        _check_available(analysis, calls, sink)
    # Every infinite path was excluded above, so a finite cut exists.
    _, (near, far) = nx.minimum_cut(graph, "source", "sink")
    chosen = [w for w in calls if ("needed", w) in far and ("computed", w) in near]
    chosen.sort(key=lambda w: analysis.position[w.node])
    return [Cached(w, cached_bytes(analysis, w) or 0) for w in chosen]


def _check_available(analysis: Analysis, calls: dict[Want, Call | DeriveError], sink: Want) -> None:
    """Raise the reason when a value can be neither cached nor computed."""
    stack, seen = [sink], set()
    while stack:
        want = stack.pop()
        if want in seen or cached_bytes(analysis, want) is not None:
            continue
        seen.add(want)
        call = calls[want]
        if isinstance(call, DeriveError):
            raise call
        stack.extend(w for w in call.wants() if w in calls)


def cached_bytes(analysis: Analysis, want: Want) -> int | None:
    """Bytes a token takes when `want` is cached, or None when it cannot be: it must be one tensor [B, ..., T, ...]."""
    value = want.node.meta.get("val")
    sizes = analysis.sizes(want.node)
    timed = [s for s in sizes if s.has_time]
    if not isinstance(value, torch.Tensor) or len(timed) != 1 or not timed[0].is_time or not sizes[0].is_batch:
        return None
    rest = [s for s in sizes[1:] if not s.has_time]
    if not all(s.is_const for s in rest):
        return None
    return prod(s.const for s in rest) * value.dtype.itemsize


def compute_time(analysis: Analysis, want: Want, call: Call, rates: Rates) -> float:
    """Modelled seconds to compute one past token of `want` at every step."""
    packet = getattr(want.node.target, "overloadpacket", None)
    if call.target in ("same", "get_attr", "constant") or packet in VIEWS or packet is None:
        return TIE
    elements = _elements(analysis, want.node)
    itemsize = want.node.meta["val"].dtype.itemsize if isinstance(want.node.meta["val"], torch.Tensor) else 4
    moved = IN_CACHE * 2 * elements * itemsize / rates.bytes
    operations = 2 * _inner(analysis, want.node) if packet in CONTRACTIONS else 4
    return TIE + elements * operations / rates.flops + moved


def _elements(analysis: Analysis, node: fx.Node) -> int:
    return prod(s.const for s in analysis.sizes(node) if s.is_const)


def _inner(analysis: Analysis, node: fx.Node) -> int:
    """Length of the contracted dim of a product."""
    first = next(a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor))
    return max(1, analysis.sizes(first)[-1].const)
