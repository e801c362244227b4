"""The op dialect: a handful of semantic operations, each specified by a reference in plain torch.

The references are the specification: tests compare every kernel with them, and code generation expands an operation to
its reference wherever it has nothing better. Names: B batch, N new tokens, S cache slots, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelc.ir.quantized import dequantize_reference
from accelc.ir.quantized_ops import (
    quantized_embedding_reference,
    quantized_grouped_linear_reference,
    quantized_linear_reference,
)

MASKS = ("causal", "window", "chunk")
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "sigmoid": torch.sigmoid,
}


# -- what a new token may see --------------------------------------------------------------------------------------


def key_positions(positions: Tensor, lengths: Tensor, slots: int) -> Tensor:
    """Position of the token in each cache slot.

    positions [B, N], lengths [B] -> [B, S]: slot s holds position s when committed (s < lengths), else the position of
    new token s - lengths; slots beyond the new tokens repeat the last new position (they are never visible).
    """
    slot = torch.arange(slots, device=positions.device)
    offset = slot[None, :] - lengths[:, None]  # [B, S]
    new = positions.gather(1, offset.clamp(0, positions.shape[1] - 1))
    return torch.where(offset < 0, slot[None, :], new)


def visible(positions: Tensor, lengths: Tensor, tree: Tensor | None, slots: int) -> Tensor:
    """Structural visibility [B, N, S] (bool): the committed prefix, and ancestors-or-self among the new tokens.

    tree [B, N, W] int64: bit j of node i's words says that node j is an ancestor of i or i itself; None means a chain.
    """
    slot = torch.arange(slots, device=positions.device)
    offset = slot[None, None, :] - lengths[:, None, None]  # [B, 1, S]
    n = positions.shape[1]
    if tree is None:
        query = torch.arange(n, device=positions.device)[None, :, None]
        return offset <= query
    j = offset.clamp(0, n - 1).expand(-1, n, -1)  # [B, N, S]
    words = tree.gather(2, j // 64)
    bit = (words >> (j % 64)) & 1
    return (offset < 0) | ((offset < n) & (bit == 1))


@torch.library.custom_op("accelc::key_positions", mutates_args=())
def key_positions_op(positions: Tensor, lengths: Tensor, slots: int) -> Tensor:
    """`key_positions` as one operation of the graph."""
    return key_positions(positions, lengths, slots)


@key_positions_op.register_fake
def _(positions, lengths, slots):
    return positions.new_empty(positions.shape[0], slots)


@torch.library.custom_op("accelc::visible", mutates_args=())
def visible_op(positions: Tensor, lengths: Tensor, tree: Tensor | None, slots: int) -> Tensor:
    """`visible` as one operation of the graph."""
    return visible(positions, lengths, tree, slots).clone()


@visible_op.register_fake
def _(positions, lengths, tree, slots):
    return positions.new_empty(positions.shape[0], positions.shape[1], slots, dtype=torch.bool)


def mask_family(mask: str, window: int, query_pos: Tensor, key_pos: Tensor) -> Tensor | None:
    """What a mask family allows beyond structure: query_pos [B, N], key_pos [B, S] -> bool [B, N, S], None for all."""
    q, k = query_pos[:, :, None], key_pos[:, None, :]
    if mask == "window":
        return q - k < window
    if mask == "chunk":
        return torch.div(q, window, rounding_mode="floor") == torch.div(k, window, rounding_mode="floor")
    if mask != "causal":
        raise ValueError(f"unknown mask family {mask!r}; known: {', '.join(MASKS)}")
    return None


# -- attention -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("accelc::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    lengths: Tensor,
    tree: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    mask: str,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention of N new tokens over a cache that already holds them; docs/design.md, 'attention'.

    query [B, H, N, D], key [B, Hk, S, D], value [B, Hk, S, Dv] (query head h reads key head h // (H // Hk)), positions
    [B, N], lengths [B], tree [B, N, W] or None, bias broadcastable to [B, H, N, S] (float, added; bool: True is
    visible), sinks [H] (an extra logit in the denominator only), slopes [H] (ALiBi). Arithmetic in fp32 (fp64 stays
    fp64). Returns [B, H, N, Dv] in query's dtype, laid out so that transpose(1, 2) is contiguous.
    """
    return attention_reference(
        query, key, value, positions, lengths, tree, bias, sinks, slopes, mask, window, scale, softcap
    )


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    lengths: Tensor,
    tree: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    mask: str,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """The specification of `attention`, in differentiable, decomposable torch."""
    b, h, n, d = query.shape
    hk, s, dv = key.shape[1], key.shape[2], value.shape[3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(wide).reshape(b, hk, h // hk, n, d)
    scores = torch.matmul(q, key.to(wide).transpose(-1, -2)[:, :, None]) * scale  # [B, Hk, G, N, S]
    scores = scores.reshape(b, h, n, s)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    key_pos = key_positions(positions, lengths, s)
    if slopes is not None:
        distance = (key_pos[:, None, :] - positions[:, :, None]).to(wide)  # [B, N, S]
        scores = scores + slopes.to(wide)[None, :, None, None] * distance[:, None]
    allowed = visible(positions, lengths, tree, s)
    family = mask_family(mask, window, positions, key_pos)
    if family is not None:
        allowed = allowed & family
    allowed = allowed[:, None]
    if bias is not None:
        if bias.dtype == torch.bool:
            allowed = allowed & bias
        else:
            scores = scores + bias.to(wide)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None].expand(b, h, n, 1)
        probs = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1)
    # Rows of garbage beyond a length may hold NaN: a zero probability must not meet them.
    v = value.to(wide)
    unseen = ~allowed.reshape(b, -1, s).any(dim=1)
    v = v.masked_fill(unseen[:, None, :, None], 0.0)
    probs = probs.reshape(b, hk, h // hk, n, s)
    out = torch.matmul(probs, v[:, :, None]).reshape(b, h, n, dv)
    return out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(query, key, value, positions, lengths, tree, bias, sinks, slopes, mask, window, scale, softcap):
    b, h, n, _ = query.shape
    return query.new_empty(b, n, h, value.shape[3]).transpose(1, 2)


@torch.library.custom_op("accelc::full_attention", mutates_args=())
def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention of a whole sequence to itself, as forward programs have it: what every spelling is raised to.

    query [B, H, T, D], key [B, Hk, T, D], value [B, Hk, T, Dv] (H % Hk == 0), bias broadcastable to [B, H, T, T]
    (float, added; bool: True is visible), sinks [H]. `is_causal` hides later keys besides. Deriving the step turns it
    into `attention`.
    """
    return full_attention_reference(query, key, value, bias, sinks, is_causal, scale, softcap)


def full_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    """The specification of `full_attention`; rows that see nothing give zeros, as fused kernels do."""
    b, h, t, d = query.shape
    hk, dv = key.shape[1], value.shape[3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(wide).reshape(b, hk, h // hk, t, d)
    scores = (torch.matmul(q, key.to(wide).transpose(-1, -2)[:, :, None]) * scale).reshape(b, h, t, t)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias.to(wide)
    if is_causal:
        row = torch.arange(t, device=query.device)
        scores = scores.masked_fill(row[None, :] > row[:, None], float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None].expand(b, h, t, 1)
        probs = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    out = torch.matmul(probs.reshape(b, hk, h // hk, t, t), value.to(wide)[:, :, None]).reshape(b, h, t, dv)
    return out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


@full_attention.register_fake
def _(query, key, value, bias, sinks, is_causal, scale, softcap):
    b, h, t, _ = query.shape
    return query.new_empty(b, t, h, value.shape[3]).transpose(1, 2)


# -- cache -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("accelc::cache_update", mutates_args={"cache"})
def cache_update(cache: Tensor, value: Tensor, lengths: Tensor, dim: int) -> None:
    """Write new rows behind the committed ones, in place.

    cache [B, ..., S, ...] with S at `dim`, value [B, ..., N, ...] with N at `dim`, lengths [B]: row i of batch row b
    goes to slot lengths[b] + i. The caller guarantees lengths + N <= S.
    """
    cache_update_reference(cache, value, lengths, dim)


def cache_update_reference(cache: Tensor, value: Tensor, lengths: Tensor, dim: int) -> None:
    """The specification of `cache_update`."""
    n = value.shape[dim]
    slot = lengths[:, None] + torch.arange(n, device=lengths.device)  # [B, N]
    shape = [1] * cache.dim()
    shape[0], shape[dim] = slot.shape
    cache.scatter_(dim, slot.reshape(shape).expand(value.shape), value.to(cache.dtype))


@cache_update.register_fake
def _(cache, value, lengths, dim):
    return None


@torch.library.custom_op("accelc::scatter_rows", mutates_args={"table"})
def scatter_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values [M, K] into the rows [M] (int64) of a table [R, K], in place. Which of several values for one row
    stays is open.
    """
    table.index_copy_(0, rows, values.to(table.dtype))


@scatter_rows.register_fake
def _(table, rows, values):
    return None


UPDATES = (torch.ops.accelc.cache_update.default, torch.ops.accelc.scatter_rows.default)
"""What writes to its first argument, and returns nothing."""


# -- norms, rotary, gates --------------------------------------------------------------------------------------------
# Their results are contiguous whatever the strides of the arguments, so that a fake value says what a kernel returns.


@torch.library.custom_op("accelc::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    """Root-mean-square norm over the last dim: x / sqrt(mean(x^2) + eps) * (weight + weight_offset), in fp32."""
    return rms_norm_reference(x, weight, eps, weight_offset).contiguous()


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    """The specification of `rms_norm`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide) + weight_offset)
    return y.to(x.dtype)


@rms_norm.register_fake
def _(x, weight, eps, weight_offset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("accelc::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x [..., R] with cos, sin broadcastable to x: x * cos + rotate(x) * sin.

    rotate maps halves (a, b) to (-b, a); with `interleaved` it maps neighbouring pairs (Su et al. 2021).
    """
    return rotary_reference(x, cos, sin, interleaved).contiguous()


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The specification of `rotary`."""
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        rotated = torch.cat((-b, a), dim=-1)
    return x * cos + rotated * sin


@rotary.register_fake
def _(x, cos, sin, interleaved):
    shape = torch.broadcast_shapes(x.shape, cos.shape, sin.shape)
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, cos.dtype))


@torch.library.custom_op("accelc::gated_activation", mutates_args=())
def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up; kind is a key of `ACTIVATIONS` (silu: SwiGLU, gelu / gelu_tanh: GeGLU; Shazeer 2020)."""
    return gated_activation_reference(gate, up, kind).contiguous()


def gated_activation_reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The specification of `gated_activation`."""
    return ACTIVATIONS[kind](gate) * up


@gated_activation.register_fake
def _(gate, up, kind):
    return torch.empty(
        torch.broadcast_shapes(gate.shape, up.shape),
        dtype=torch.promote_types(gate.dtype, up.dtype),
        device=gate.device,
    )


# -- choices ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("accelc::top_k", mutates_args=())
def top_k(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest scores [..., V] of each row, the largest first: int64 [..., k].

    Of equal scores the first comes first, and NaN is above all.
    """
    return top_k_reference(scores, k).contiguous()


def top_k_reference(scores: Tensor, k: int) -> Tensor:
    """The specification of `top_k`."""
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@top_k.register_fake
def _(scores, k):
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)


REFERENCES = {
    torch.ops.accelc.key_positions.default: key_positions,
    torch.ops.accelc.visible.default: visible,
    torch.ops.accelc.full_attention.default: full_attention_reference,
    torch.ops.accelc.attention.default: attention_reference,
    torch.ops.accelc.rms_norm.default: rms_norm_reference,
    torch.ops.accelc.rotary.default: rotary_reference,
    torch.ops.accelc.gated_activation.default: gated_activation_reference,
    torch.ops.accelc.top_k.default: top_k_reference,
}
"""Functional dialect operations and the reference that code generation may expand them to."""

QUANTIZED = {
    torch.ops.accelc.dequantize.default: dequantize_reference,
    torch.ops.accelc.quantized_linear.default: quantized_linear_reference,
    torch.ops.accelc.quantized_embedding.default: quantized_embedding_reference,
    torch.ops.accelc.quantized_grouped_linear.default: quantized_grouped_linear_reference,
}
"""Operations on weights in few bits with their references. They are never expanded: that would write out the floats."""
