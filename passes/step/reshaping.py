"""Role rules of the operations that move, join and part elements without mixing tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from accelc.ir.errors import DeriveError
from accelc.passes.step.analysis import Analysis
from accelc.passes.step.rules import aligned, negative, rebuilt, rule, scalars
from accelc.passes.step.sizes import Size
from accelc.passes.step.wants import Call, Dim, Roles, Want

aten = torch.ops.aten


@rule(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as)
def _reshape(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source = node.args[0]
    inputs = reshape_roles(analysis, node, source, roles)
    return Call(aten.reshape.default, (Want(source, inputs), analysis.dims(node, roles)), prefix_sizes=1)


def reshape_roles(analysis: Analysis, node: fx.Node, source: fx.Node, roles: Roles) -> Roles:
    """Roles of a reshape's input: dims are grouped so that products agree; a group passes its one role on."""
    before, after = analysis.sizes(source), analysis.sizes(node)
    result: list[str | None] = [None] * len(before)
    for ins, outs in _groups(
        before, after, lambda: analysis.refuse(node, "regroups dims in a way that is not followed")
    ):
        wanted = {roles[d] for d in outs if after[d].has_time}
        carrying = [d for d in ins if before[d].has_time]
        if len(wanted) > 1 or len(carrying) > 1:
            raise analysis.refuse(node, "merges two sequence dims into one")
        for d in carrying:
            result[d] = next(iter(wanted))
    return tuple(result)


def _groups(
    before: tuple[Size, ...], after: tuple[Size, ...], error: Callable[[], DeriveError]
) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of input and output dims with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs = ([i] if i < len(before) else []), ([j] if j < len(after) else [])
        i, j = i + len(ins), j + len(outs)
        while True:
            left, right = product([before[d] for d in ins]), product([after[d] for d in outs])
            if left == right and left is not None:
                break
            if right is None or (left is not None and _smaller(left, right)):
                if i >= len(before):
                    raise error()
                ins.append(i)
                i += 1
            else:
                if j >= len(after):
                    raise error()
                outs.append(j)
                j += 1
        groups.append((ins, outs))
    return groups


def product(sizes: list[Size]) -> tuple[int, int, int] | None:
    """Product of monomial sizes as (coefficient, power of B, power of T); None when a factor is a sum."""
    coefficient, batch, time = 1, 0, 0
    for s in sizes:
        terms = [(c, b, t) for c, b, t in ((s.const, 0, 0), (s.batch, 1, 0), (s.time, 0, 1), (s.rows, 1, 1)) if c]
        if len(terms) > 1:
            return None
        c, b, t = terms[0] if terms else (0, 0, 0)
        coefficient, batch, time = coefficient * c, batch + b, time + t
    return coefficient, batch, time


def _smaller(left: tuple[int, int, int], right: tuple[int, int, int]) -> bool:
    """Which side of a reshape group has fewer elements so far, for large B and larger T."""
    return (left[2], left[1], left[0]) < (right[2], right[1], right[0])


@rule(aten.expand)
def _expand(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source = node.args[0]
    arguments = (aligned(analysis, source, roles), analysis.dims(node, roles))
    return Call(aten.expand.default, arguments, broadcast=True, prefix_sizes=1)


@rule(aten.expand_as)
def _expand_as(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    return _expand(analysis, node, roles)


@rule(aten.transpose, aten.swapaxes, aten.swapdims, aten.t, aten.numpy_T, aten.mT)
def _transpose(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    rank = len(roles)
    a, b = (node.args[1], node.args[2]) if len(node.args) == 3 else (-2, -1)
    a, b = negative(a, rank), negative(b, rank)
    swapped = list(roles)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return Call(aten.transpose.int, (Want(node.args[0], tuple(swapped)), a, b))


@rule(aten.permute)
def _permute(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    rank = len(roles)
    order = [d % rank for d in node.args[1]]
    inputs: list[str | None] = [None] * rank
    for out, source in enumerate(order):
        inputs[source] = roles[out]

    def emit(build: Any, call: Call, values: list[Any], lifted: bool) -> fx.Node:
        dims = [0, *(d + 1 for d in order)] if lifted else order
        return build.call(aten.permute.default, values[0], dims)

    return Call(aten.permute.default, (Want(node.args[0], tuple(inputs)),), emit=emit)


@rule(aten.unsqueeze)
def _unsqueeze(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    dim = negative(node.args[1], len(roles))
    inputs = list(roles)
    del inputs[dim]
    return Call(aten.unsqueeze.default, (Want(node.args[0], tuple(inputs)), dim))


@rule(aten.squeeze)
def _squeeze(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source = node.args[0]
    rank = len(analysis.sizes(source))
    listed = (
        node.args[1] if len(node.args) > 1 else [d for d, s in enumerate(analysis.sizes(source)) if s == Size(const=1)]
    )
    listed = [listed] if isinstance(listed, int) else listed
    gone = {d % rank for d in listed if analysis.sizes(source)[d] == Size(const=1)}
    rest = iter(roles)
    inputs = tuple(None if d in gone else next(rest) for d in range(rank))
    return Call(aten.squeeze.dims, (Want(source, inputs), [negative(d, rank) for d in sorted(gone)]))


@rule(aten.slice)
def _slice(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    source, dim, start, end, step = given
    rank = len(roles)
    if analysis.sizes(source) == analysis.sizes(node):
        return Call("same", (Want(source, roles),))
    if analysis.sizes(source)[dim].has_time:
        raise analysis.refuse(node, "takes a part of the sequence")
    inputs = tuple(r if s.has_time else None for s, r in zip(analysis.sizes(source), roles, strict=True))
    bounds = [scalars(analysis, node, b) for b in (start, end, step)]
    return Call(aten.slice.Tensor, (Want(source, inputs), negative(dim, rank), *bounds))


@rule(aten.select)
def _select(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source, dim, index = node.args
    rank = len(analysis.sizes(source))
    if analysis.sizes(source)[dim].has_time:
        raise analysis.refuse(node, "picks one token of the sequence")
    dim = negative(dim, rank)
    inputs = list(roles)
    inputs.insert(rank + dim, None)
    return Call(aten.select.int, (Want(source, tuple(inputs)), dim, scalars(analysis, node, index)))


@rule(aten.cat, aten.concat, aten.concatenate, aten.stack)
def _cat(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    parts = node.args[0]
    dim = negative(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0), len(roles))
    if node.target.overloadpacket is aten.stack:
        inputs = list(roles)
        del inputs[dim]
        return Call(aten.stack.default, ([Want(p, tuple(inputs)) for p in parts], dim), broadcast=True)
    if any(analysis.sizes(p)[dim].has_time for p in parts):
        raise analysis.refuse(node, "appends along the sequence")
    return Call(aten.cat.default, ([aligned(analysis, p, roles) for p in parts], dim), broadcast=True)


@rule(aten.slice_scatter, aten.select_scatter)
def _scatter_part(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source, part, dim = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else 0
    rank = len(roles)
    if analysis.sizes(source)[dim].has_time and analysis.sizes(part) != analysis.sizes(node):
        raise analysis.refuse(node, "writes to a part of the sequence")
    inputs = list(roles)
    if node.target.overloadpacket is aten.select_scatter:
        del inputs[negative(dim, rank)]
    tensors = {0: Want(source, roles), 1: Want(part, tuple(inputs)), 2: negative(dim, rank)}
    return rebuilt(analysis, node, tensors, broadcast=True)


@rule(
    aten.split, aten.unsafe_split, aten.unsafe_chunk, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split
)
def _split(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source = node.args[0]
    rank = len(analysis.sizes(source))
    unbind = node.target.overloadpacket is aten.unbind
    position = 1 if unbind else 2
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    if analysis.sizes(source)[dim].has_time:
        raise analysis.refuse(node, "splits the sequence")
    dim = negative(dim, rank)
    inputs = list(roles)
    if unbind:
        inputs.insert(rank + dim, None)
    middle = () if unbind else (scalars(analysis, node, node.args[1]),)
    return Call(node.target, (Want(source, tuple(inputs)), *middle, dim))


@rule(aten.repeat_interleave)
def _repeat_interleave(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    if len(node.args) < 3 or not isinstance(node.args[2], int) or analysis.sizes(node)[node.args[2]].has_time:
        raise analysis.refuse(node, "repeats along the sequence")
    return rebuilt(analysis, node, {0: Want(node.args[0], roles), 2: negative(node.args[2], len(roles))})


@rule(aten.pad, aten.constant_pad_nd)
def _pad(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    amounts = node.args[1]
    for i in range(len(amounts) // 2):
        if analysis.sizes(node)[-1 - i].has_time and (amounts[2 * i], amounts[2 * i + 1]) != (0, 0):
            raise analysis.refuse(node, "pads, and so shifts, the sequence")
    return rebuilt(analysis, node, {0: Want(node.args[0], roles)})


@rule(aten.view_as_complex, aten.view_as_real, torch.ops.aten.real, torch.ops.aten.imag)
def _complex(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    change = len(analysis.sizes(node.args[0])) - len(roles)
    inputs = (*roles, None) if change == 1 else roles[:-1] if change == -1 else roles
    return Call(node.target, (Want(node.args[0], tuple(inputs)),))


@rule(aten.flip, aten.diag_embed)
def _flip(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    dims = node.args[1] if len(node.args) > 1 else [-1]
    if node.target.overloadpacket is aten.diag_embed or any(analysis.sizes(node)[d].has_time for d in dims):
        raise analysis.refuse(node, "reorders the sequence")
    return Call(node.target, (Want(node.args[0], roles), [negative(d, len(roles)) for d in dims]))


@rule(aten.repeat)
def _repeat(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source = node.args[0]
    before, after = analysis.sizes(source), analysis.sizes(node)
    pad = len(after) - len(before)
    factors: list[Any] = []
    for d, size in enumerate(after):
        old = before[d - pad] if d >= pad else Size(const=1)
        if old == size:
            factors.append(1)
        elif old == Size(const=1):
            factors.append(Dim(size, roles[d]))
        elif old.is_const and size.is_const:
            factors.append(size.const // old.const)
        elif old == Size(rows=old.rows) and size.rows % (old.rows or 1) == 0 and size == Size(rows=size.rows):
            factors.append(size.rows // old.rows)  # merged rows copied, once for each expert
        else:
            raise analysis.refuse(node, "repeats along the sequence")
    inputs = tuple(r if s.has_time else None for s, r in zip(before, roles[pad:], strict=True))
    return Call(aten.repeat.default, (Want(source, inputs), factors), broadcast=True, prefix_sizes=1)
