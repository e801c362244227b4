"""Role rules of operations that reduce, contract, look up or sort: where tokens meet.

A reduced or contracted sequence dim demands Key, and what a query may not see is hidden there: filled with -inf
before a softmax or maximum, with 0 before a sum or product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from accelc.passes.step.analysis import Analysis, is_size
from accelc.passes.step.rules import aligned, negative, rebuilt, rule, scalars
from accelc.passes.step.selection import mark_keys, top_keys
from accelc.passes.step.wants import Call, Input, K, Masked, Q, Roles, Want

aten = torch.ops.aten
accelc = torch.ops.accelc
INF = float("inf")


# -- along a dim -----------------------------------------------------------------------------------------------------


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax)
def _softmax(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source, dim = node.args[0], node.args[1]
    if not analysis.sizes(node)[dim].has_time:
        return rebuilt(analysis, node, {0: Want(source, roles), 1: negative(dim, len(roles))})
    if roles[dim] != K or Q not in roles:
        raise analysis.refuse(node, "normalises over the sequence without a query")
    return rebuilt(
        analysis, node, {0: Masked(Want(source, roles), -INF), 1: negative(dim, len(roles))}, zero_hidden=True
    )  # fmt: skip


FILLS = {
    aten.sum: 0.0,
    aten.amax: -INF,
    aten.amin: INF,
    aten.max: -INF,
    aten.min: INF,
    aten.any: 0.0,
    aten.logsumexp: -INF,
}
"""What hides an element from a reduction."""


@rule(aten.sum, aten.amax, aten.amin, aten.max, aten.min, aten.any, aten.logsumexp)
@rule(
    aten.mean, aten.var, aten.std, aten.prod, aten.all, aten.var_mean, aten.linalg_vector_norm, aten.norm, aten.argmax
)
def _reduce(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source = node.args[0]
    packet = node.target.overloadpacket
    sizes = analysis.sizes(source)
    rank = len(sizes)
    if packet in (aten.max, aten.min) and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return Call(node.target, tuple(aligned(analysis, a, roles) for a in node.args), broadcast=True)
    position = 2 if packet in (aten.linalg_vector_norm, aten.norm) else 1
    dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    listed = [dims] if isinstance(dims, int) else list(dims or range(rank))
    reduced = {d % rank for d in listed}
    keepdim = len(roles) == rank
    rest = iter(roles)
    inputs: list[str | None] = []
    for d in range(rank):
        role = next(rest) if keepdim or d not in reduced else None
        inputs.append((K if d in reduced else role) if sizes[d].has_time else None)
    over_time = [d for d in reduced if sizes[d].has_time]
    want = Want(source, tuple(inputs))
    masked: Want | Masked = want
    if over_time:
        if packet not in FILLS or Q not in inputs:
            raise analysis.refuse(
                node, "reduces over the sequence in a way that depends on its length or on later tokens"
            )
        masked = Masked(want, FILLS[packet])
    negatives: Any = negative(dims, rank) if isinstance(dims, int) else [negative(d % rank, rank) for d in listed]
    return rebuilt(analysis, node, {0: masked, position: negatives})


@rule(aten.topk, aten.sort, aten.argsort, aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.glu)
def _along(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    packet = node.target.overloadpacket
    source = node.args[0]
    rank = len(roles)
    position = 2 if packet is aten.topk else 1
    default = 0 if packet in (aten.cumsum, aten.cumprod) else -1
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if "stable" in node.target._overloadname:
        dim = node.kwargs.get("dim", -1)
    size = analysis.sizes(source)[dim]
    if size.time and packet is aten.cumsum and size.is_time and roles[dim] == Q:
        return _running_sum(analysis, node, source, dim % rank, roles)
    if size.is_time and packet is aten.topk:
        return top_keys(analysis, node, source, dim % rank, roles)
    accumulates = packet in (aten.cumsum, aten.cumprod, aten.logcumsumexp)
    what = "accumulates" if accumulates else "sorts"
    if size.time:
        raise analysis.refuse(node, f"{what} along the sequence, which needs running state")
    if size.batch or (size.rows and accumulates):
        raise analysis.refuse(node, f"{what} along the rows of the batch, so that a row changes with the others")
    if size.rows:
        return router(analysis, node, roles)
    call = rebuilt(analysis, node, {0: Want(source, roles)})
    if len(node.args) > position:
        call.args = (*call.args[:position], negative(dim, rank), *call.args[position + 1 :])
    elif "dim" in node.kwargs:
        call.kwargs["dim"] = negative(dim, rank)
    return call


def _running_sum(analysis: Analysis, node: fx.Node, source: fx.Node, dim: int, roles: Roles) -> Call:
    """A sum over a token and all before it is a product with what the token sees: right for trees and rollbacks."""
    if not analysis.sizes(source)[0].is_batch or dim == 0:
        raise analysis.refuse(node, "accumulates along the sequence in a value without a batch dim in front")
    inputs = tuple(K if d == dim else r for d, r in enumerate(roles))
    if Q in inputs:
        raise analysis.refuse(node, "accumulates along one of two sequence dims")
    rank, dtype = len(roles), node.meta["val"].dtype
    wide = dtype if dtype.is_floating_point else torch.float64  # exact for integers below 2^53

    def emit(build: Any, call: Call, values: list[Any], lifted: bool) -> fx.Node:
        order = [*(d for d in range(rank) if d != dim), dim]
        keys = build.call(aten._to_copy.default, build.call(aten.permute.default, values[0], order), dtype=wide)
        seen = build.call(aten._to_copy.default, build.call(aten.logical_not.default, build.visible()), dtype=wide)
        for _ in range(rank - 3):  # [B, N, S] against [B, ..., S]
            seen = build.call(aten.unsqueeze.default, seen, 1)
        if rank == 2:
            keys = build.call(aten.unsqueeze.default, keys, 1)
        total = build.call(aten.matmul.default, keys, build.call(aten.transpose.int, seen, -1, -2))
        if rank == 2:
            total = build.call(aten.squeeze.dim, total, 1)
        back = build.call(aten.permute.default, total, [order.index(d) for d in range(rank)])
        return build.call(aten._to_copy.default, back, dtype=dtype)

    return Call(node.target, (Want(source, inputs),), emit=emit)


@rule(aten.tril)
def _lower_triangle(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """The lower triangle of scores or weights is what a query may see; the rest becomes 0."""
    if roles[-2:] != (Q, K) or (len(node.args) > 1 and node.args[1] != 0):
        raise analysis.refuse(node, "takes a triangle that is not between queries and keys, or off the diagonal")
    return Call(aten.clone.default, (Masked(Want(node.args[0], roles), 0.0),), broadcast=True, zero_hidden=True)


@rule(aten.layer_norm, aten.rms_norm, aten.native_layer_norm, accelc.rms_norm)
def _norm(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    normalised = node.args[1] if isinstance(node.args[1], list | tuple) else [0]
    if any(s.has_time for s in analysis.sizes(node.args[0])[-len(normalised) :]):
        raise analysis.refuse(node, "normalises over the sequence")
    tensors: dict[int, Any] = {
        i: analysis.want(a, Q) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and not is_size(a)
    }
    return rebuilt(analysis, node, {**tensors, 0: Want(node.args[0], roles)})


@rule(aten.batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm)
def _batch_norm(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """With statistics that were kept in training, an affine map of each channel (dim 1)."""
    training = node.target.overloadpacket is not aten._native_batch_norm_legit_no_training and node.args[5]
    if training or node.args[3] is None:
        raise analysis.refuse(
            node,
            "normalises by statistics of the batch",
            "Keep statistics (track_running_stats=True), and model.eval().",
        )
    if len(roles) > 1 and roles[1] is not None:
        raise analysis.refuse(node, "takes the sequence for the dim of channels")
    return _along_rows(analysis, node, roles)


@rule(aten.group_norm)
def _group_norm(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """Statistics of each row (dim 0), over groups of channels and every dim behind them."""
    if any(s.has_time for s in analysis.sizes(node.args[0])[1:]):
        raise analysis.refuse(node, "normalises over the sequence")
    return _along_rows(analysis, node, roles)


def _along_rows(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """The operation on `roles` of its first argument, and its parameters as they are."""
    if K in roles and not analysis.sizes(node.args[0])[0].is_batch:
        raise analysis.refuse(node, "would have to be computed again for all past tokens")
    tensors: dict[int, Any] = {
        i: analysis.want(a, Q) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and not is_size(a)
    }
    return rebuilt(analysis, node, {**tensors, 0: Want(node.args[0], roles)})


# -- contractions ----------------------------------------------------------------------------------------------------


@rule(aten.matmul, aten.bmm, aten.mm)
def _matmul(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    return Call(node.target, _operands(analysis, node, node.args[0], node.args[1], roles), broadcast=True)


@rule(aten.addmm, aten.baddbmm)
def _addmm(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    a, b = _operands(analysis, node, node.args[1], node.args[2], roles)
    kwargs = {k: scalars(analysis, node, v) for k, v in node.kwargs.items()}
    return Call(node.target, (aligned(analysis, node.args[0], roles), a, b), kwargs, broadcast=True)


def _operands(analysis: Analysis, node: fx.Node, a: fx.Node, b: fx.Node, roles: Roles) -> tuple[Any, ...]:
    """The wants of a matrix product's operands, the contracted dim in Key."""
    left, right = analysis.sizes(a), analysis.sizes(b)
    if len(left) < 2 or len(right) < 2:
        raise analysis.refuse(node, "multiplies vectors")
    contracted = K if left[-1].has_time else None
    wants = []
    for operand, sizes, tail in ((a, left, (roles[-2], contracted)), (b, right, (contracted, roles[-1]))):
        batch = roles[:-2][len(roles) - len(sizes) :] if len(sizes) > 2 else ()
        wanted = (*batch, *tail)
        wants.append(Want(operand, tuple(r if s.has_time else None for s, r in zip(sizes, wanted, strict=True))))
    return tuple(hidden(analysis, node, wants, contracted))


def hidden(analysis: Analysis, node: fx.Node, wants: list[Want], contracted: str | None) -> list[Want | Masked]:
    """Hide, in the operand that has both query and key, what the query may not see."""
    if contracted is None:
        return list(wants)
    both = [w for w in wants if Q in w.roles and K in w.roles]
    if not both:
        raise analysis.refuse(node, "sums over the whole sequence without a query, which needs running state")
    return [Masked(w, 0.0) if w is both[0] else w for w in wants]


@rule(aten.linear, accelc.quantized_linear)
def _linear(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source, weight = node.args[0], node.args[1]
    if analysis.sizes(source)[-1].has_time or any(s.has_time for s in analysis.sizes(weight)):
        raise analysis.refuse(node, "multiplies along the sequence by a weight")
    tensors = {i: analysis.want(a, Q) for i, a in enumerate(node.args) if isinstance(a, fx.Node)}
    tensors[0] = Want(source, (*roles[:-1], None))
    return Call(node.target, tuple(tensors.get(i, a) for i, a in enumerate(node.args)))


@rule(aten.einsum)
def _einsum(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if "..." in equation or "->" not in equation:
        raise analysis.refuse(node, "is an einsum with an ellipsis or without an explicit result")
    terms, result = equation.split("->")
    role_of: dict[str, str | None] = dict(zip(result, roles, strict=True))
    wants = []
    contracted = None
    for letters, operand in zip(terms.split(","), operands, strict=True):
        wanted = []
        for letter, size in zip(letters, analysis.sizes(operand), strict=True):
            role = role_of.get(letter, K) if size.has_time else None
            contracted = K if role == K and letter not in result else contracted
            wanted.append(role)
        wants.append(Want(operand, tuple(wanted)))
    return Call(node.target, (equation, hidden(analysis, node, wants, contracted)))


@rule(accelc.full_attention)
def _full_attention(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    query, key, value, bias, sinks, _, scale, softcap = node.args
    if roles[-2] != Q:
        raise analysis.refuse(node, "would have to be computed again for all past queries")
    return _attention(analysis, node, query, key, value, bias, sinks, scale, softcap)


@rule(aten.scaled_dot_product_attention)
def _sdpa(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    if not analysis.sizes(query)[-2].has_time and not analysis.sizes(key)[-2].has_time:
        same = {
            i: aligned(analysis, a, roles) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and not is_size(a)
        }
        return rebuilt(analysis, node, same, broadcast=True)
    if len(roles) != 4:
        raise analysis.refuse(node, "is attention over a rank other than [B, H, T, D]")
    if roles[-2] != Q:
        raise analysis.refuse(node, "would have to be computed again for all past queries")
    scale = given.get("scale") or analysis.sizes(query)[-1].const ** -0.5
    return _attention(analysis, node, query, key, value, given.get("attn_mask"), None, scale, 0.0)


def _attention(
    analysis: Analysis, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node,
    bias: fx.Node | None, sinks: fx.Node | None, scale: float, softcap: float,
) -> Call:  # fmt: skip
    if not analysis.sizes(query)[-2].is_time or not analysis.sizes(key)[-2].is_time:
        raise analysis.refuse(node, "attends between dims that are not the sequence")
    wanted_bias = None
    if bias is not None:
        sizes = analysis.sizes(bias)
        ends = (Q, K)[2 - min(len(sizes), 2) :]
        if any(s.has_time for s in sizes[:-2]):
            raise analysis.refuse(node, "has a bias with a third sequence dim")
        wanted = (
            *(None for _ in sizes[:-2]),
            *(r if s.has_time else None for s, r in zip(sizes[-2:], ends, strict=True)),
        )
        wanted_bias = Want(bias, wanted)
    step = [Input("positions"), Input("lengths"), None]  # a chain
    args = [analysis.want(query, Q), analysis.want(key, K), analysis.want(value, K), *step, wanted_bias]
    sink = analysis.want(sinks, Q) if sinks is not None else None
    return Call(
        accelc.attention.default,
        (*args, sink, None, "causal", 0, scalars(analysis, node, scale), scalars(analysis, node, softcap)),
        broadcast=True,
    )


# -- look-ups and routers --------------------------------------------------------------------------------------------


@rule(aten.embedding)
def _embedding(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    return Call(node.target, (analysis.want(node.args[0], Q), Want(node.args[1], roles[:-1])))


@rule(accelc.quantized_embedding)
def _quantized_embedding(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    ids, *table = node.args
    rest = [analysis.want(a, Q) if isinstance(a, fx.Node) else a for a in table]
    return Call(node.target, (Want(ids, roles[:-1]), *rest))


@rule(aten.index_select)
def _index_select(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """Parts picked along a dim of fixed size move no tokens; picked rows are a router's."""
    source, dim, index = node.args
    if not analysis.sizes(source)[dim].is_const or not analysis.is_static(index):
        return router(analysis, node, roles)
    return Call(node.target, (Want(source, roles), negative(dim, len(roles)), analysis.want(index, Q)))


@rule(aten.gather)
def _gather(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source, dim, index = node.args[:3]
    size = analysis.sizes(source)[dim]
    if size.time:
        raise analysis.refuse(node, "gathers along the sequence")
    if size.rows:
        return router(analysis, node, roles)
    return Call(node.target, (Want(source, roles), negative(dim, len(roles)), Want(index, roles)))


@rule(aten.index)
def _index(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    source, indices = node.args
    indexed = [d for d, i in enumerate(indices) if i is not None]
    if any(analysis.sizes(source)[d].time for d in indexed):
        raise analysis.refuse(node, "picks tokens of the sequence by index")
    return router(analysis, node, roles)


@rule(aten.scatter)
def _scatter(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    if analysis.sizes(node)[node.args[1]].time:
        return mark_keys(analysis, node, roles)
    return router(analysis, node, roles)


@rule(aten.index_put, aten.index_add, aten.scatter_add, aten.scatter_reduce, aten.histc)
@rule(aten.bincount, aten.one_hot, aten._grouped_mm, aten.searchsorted, aten.bucketize, aten.index_copy)
@rule("transformers::grouped_mm_fallback", "aten::_grouped_mm", accelc.quantized_grouped_linear)
def router(analysis: Analysis, node: fx.Node, roles: Roles) -> Call:
    """Known routers: they shuffle rows (batch and tokens merged) and bring them back, as mixtures of experts do.

    They take all rows of the new tokens; the check confirms that rows do not mix.
    """
    if K in roles:
        raise analysis.refuse(node, "routes tokens and would have to do it again for all past ones")

    def convert(value: Any) -> Any:
        if isinstance(value, fx.Node) and not is_size(value):
            return analysis.want(value, Q)
        if isinstance(value, list | tuple):
            return [convert(v) for v in value]
        return scalars(analysis, node, value)

    return Call(node.target, tuple(map(convert, node.args)), {k: convert(v) for k, v in node.kwargs.items()})
