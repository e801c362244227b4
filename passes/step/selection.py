"""Sparse attention: each query picks the keys with the highest scores and attends to these alone.

In the forward that is a top-k along the keys, whose indices are written as marks into a mask [.., T, T]. In the step
the indices number cache slots instead of tokens, and the mask has a column for each slot, so the two agree as long as
the indices are used for nothing but marking.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from accelc.passes.step.analysis import SIZE_ONLY, Analysis
from accelc.passes.step.rules import negative, scalars
from accelc.passes.step.wants import Call, K, Masked, Q, Roles, Want

aten = torch.ops.aten
COPIES = {aten.to, aten._to_copy, aten.clone, aten.contiguous}


def top_keys(analysis: Analysis, node: fx.Node, source: fx.Node, dim: int, roles: Roles) -> Call:
    """The highest scores of each query, among the slots it sees; slots that it does not see come last.

    Where fewer slots are seen than picked, hidden ones are picked too: what the marks mask, they are hidden already.
    """
    inputs = tuple(K if d == dim else r for d, r in enumerate(roles))
    if inputs.count(K) != 1 or Q not in inputs:
        raise analysis.refuse(node, "picks tokens of the sequence without a query")
    if not source.meta["val"].is_floating_point():
        raise analysis.refuse(node, "picks keys by scores that are not floating-point")
    if not (analysis.sizes(node)[dim].is_time or analysis.sizes(node)[dim].is_const):
        raise analysis.refuse(node, "picks a number of keys that grows with the sequence")
    largest = node.args[3] if len(node.args) > 3 else node.kwargs.get("largest", True)
    for result in node.users:
        if result.args[1] == 0 or not _only_marks(analysis, result):
            raise analysis.refuse(node, "picks keys for something else than a mask over them")
    size = analysis.sizes(node)[dim]
    along = negative(dim, len(roles))

    def emit(build: Any, call: Call, values: list[Any], lifted: bool) -> fx.Node:
        slots = build.slots()
        count = slots if size.has_time else build.once(("top", size.const), torch.sym_min, size.const, slots)
        return build.call(node.target, values[0], count, along, largest)

    hidden = Masked(Want(source, inputs), -float("inf") if largest else float("inf"))
    return Call(node.target, (hidden,), emit=emit)


def mark_keys(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """A number written at the picked keys of each query."""
    source, dim, index, mark = node.args
    if roles[dim] != K or Q not in roles or not _is_top(index):
        raise analysis.refuse(node, "writes along the sequence at indices that are not picked by a top-k over keys")
    if isinstance(mark, fx.Node):
        raise analysis.refuse(node, "writes values along the sequence at picked keys")
    picked = tuple(r if s.has_time else None for r, s in zip(roles, analysis.sizes(index), strict=True))
    arguments = (Want(source, roles), negative(dim, len(roles)), Want(index, picked), scalars(analysis, node, mark))
    return Call(node.target, arguments)


def _only_marks(analysis: Analysis, index: fx.Node) -> bool:
    """Whether an index tensor goes, through copies, into nothing but marks along the sequence; its size may be read."""
    for user in index.users:
        packet = getattr(user.target, "overloadpacket", None)
        if user.target in SIZE_ONLY or (packet in COPIES and _only_marks(analysis, user)):
            continue
        is_index = packet is aten.scatter and user.args[2] is index and index not in (user.args[0], user.args[3])
        if not is_index or not analysis.sizes(user)[user.args[1]].is_time:
            return False
    return True


def _is_top(index: fx.Node) -> bool:
    """Whether an index tensor is the second result of a top-k, through copies."""
    while getattr(index.target, "overloadpacket", None) in COPIES:
        index = index.args[0]
    producer = index.args[0] if index.op == "call_function" and index.args else None
    return isinstance(producer, fx.Node) and getattr(producer.target, "overloadpacket", None) is aten.topk
