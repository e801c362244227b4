"""Triton kernels of attention over a cache; `accelc.codegen.gpu.attention` launches them.

A program takes some rows of one key head: a row is a new token and one of the query heads that read the key head, so
that grouped queries share what is loaded. Keys are split over programs, and a second kernel joins the parts by their
maxima and sums. Lengths are read on the device: a split that has nothing to do says so and ends.

What is visible is computed, not loaded: committed slots by the mask family, new tokens by the ancestors' bits.

Triton's library functions (`tl.max`, `tl.sum`, ...) are themselves compiled functions, which keeps a program from being
interpreted if triton was imported before: reductions are spelled by what these combine with.
"""

from __future__ import annotations

import triton
import triton.language as tl

_maximum = tl.standard._elementwise_max
_plus = tl.standard._sum_combine
NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _product(a, b, acc, WIDEN: tl.constexpr):
    """a @ b + acc in fp32. The interpreter multiplies no bf16."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _capped(x, cap):
    """tanh(x / cap) * cap, without overflow."""
    e = tl.exp(-2.0 * tl.abs(x) / cap)
    y = cap * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, lengths_ptr, tree_ptr, bias_ptr, slopes_ptr, parts_ptr, sums_ptr,
    N, window, scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_row, bias_slot,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr, SLOTS_AT_ONCE: tl.constexpr,
    SPLITS: tl.constexpr, WORDS: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Rows of one key head against a part of the slots.

    Strides are in elements, the last dims contiguous. parts fp32 [B, KEY_HEADS, N * GROUP, SPLITS, DV] gets weighted
    sums of values, sums fp32 [B, KEY_HEADS, N * GROUP, SPLITS, 2] the largest score and the sum of weights. The grid is
    (blocks of ROWS, B * KEY_HEADS, SPLITS). D = D0 + D1 with D0 a power of two and D1 what is left, padded to one.
    """
    batch, key_head = tl.program_id(1) // KEY_HEADS, tl.program_id(1) % KEY_HEADS
    split = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N * GROUP
    node = tl.where(live, row // GROUP, 0)
    head = key_head * GROUP + row % GROUP
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    position = tl.load(positions_ptr + batch * N + node).to(tl.int32)

    # Which slots the rows of this program may see at all.
    end = length + N
    if WORDS == 0:
        end = tl.minimum(end, length + (tl.program_id(0) * ROWS + ROWS - 1) // GROUP + 1)
    begin = 0
    if MASK != "causal":
        first = -tl.reduce(tl.where(live, -position, -2147483647), 0, _maximum)
        earliest = first - window + 1 if MASK == "window" else (first // window) * window
        begin = tl.minimum(tl.maximum(earliest, 0), length) // SLOTS_AT_ONCE * SLOTS_AT_ONCE
    steps = (end - begin + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE
    each = (steps + SPLITS - 1) // SPLITS * SLOTS_AT_ONCE
    begin = begin + split * each
    stop = tl.minimum(begin + each, end)

    d0 = tl.arange(0, D0)
    q_at = q_ptr + batch.to(tl.int64) * q_batch + head[:, None] * q_head + node[:, None] * q_row
    k_at = k_ptr + batch.to(tl.int64) * k_batch + key_head.to(tl.int64) * k_head
    v_at = v_ptr + batch.to(tl.int64) * v_batch + key_head.to(tl.int64) * v_head
    q0 = tl.load(q_at + d0[None, :], mask=live[:, None] & (d0[None, :] < D), other=0.0)
    if D1 > 0:
        d1 = tl.arange(0, D1)
        q1 = tl.load(q_at + D0 + d1[None, :], mask=live[:, None] & (d1[None, :] < D - D0), other=0.0)
    dv = tl.arange(0, DV_PADDED)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=live, other=0.0).to(tl.float32)

    largest = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    acc = tl.full((ROWS, DV_PADDED), 0.0, tl.float32)
    nothing = tl.full((ROWS, SLOTS_AT_ONCE), 0.0, tl.float32)
    for start in tl.range(begin, stop, SLOTS_AT_ONCE, num_stages=STAGES):
        slot = start + tl.arange(0, SLOTS_AT_ONCE)
        inside = slot < stop
        k_row_at = k_at + slot[None, :].to(tl.int64) * k_row
        k0 = tl.load(k_row_at + d0[:, None], mask=inside[None, :] & (d0[:, None] < D), other=0.0)
        scores = _product(q0, k0, nothing, WIDEN)
        if D1 > 0:
            k1 = tl.load(k_row_at + D0 + d1[:, None], mask=inside[None, :] & (d1[:, None] < D - D0), other=0.0)
            scores = _product(q1, k1, scores, WIDEN)
        scores = scores * scale
        if CAPPED:
            scores = _capped(scores, softcap)
        new = slot - length  # which of the new tokens
        among = tl.minimum(tl.maximum(new, 0), N - 1)
        if WORDS == 0:
            allowed = inside[None, :] & (new[None, :] <= node[:, None])
        else:
            word_at = tree_ptr + ((batch * N + node) * WORDS)[:, None] + (among // 64)[None, :]
            word = tl.load(word_at, mask=inside[None, :] & (new[None, :] >= 0), other=0)
            bit = (word >> (among % 64)[None, :].to(tl.int64)) & 1
            allowed = inside[None, :] & ((new[None, :] < 0) | (bit == 1))
        if MASK != "causal" or slopes_ptr is not None:
            of_new = tl.load(positions_ptr + batch * N + among, mask=inside, other=0).to(tl.int32)
            key_position = tl.where(new < 0, slot, of_new)
            if slopes_ptr is not None:
                scores += slope[:, None] * (key_position[None, :] - position[:, None]).to(tl.float32)
            if MASK == "window":
                allowed = allowed & (position[:, None] - key_position[None, :] < window)
            elif MASK == "chunk":
                allowed = allowed & ((position // window)[:, None] == (key_position // window)[None, :])
        if bias_ptr is not None:
            of_row = head[:, None].to(tl.int64) * bias_head + node[:, None].to(tl.int64) * bias_row
            bias_at = bias_ptr + batch.to(tl.int64) * bias_batch + of_row
            given = tl.load(bias_at + slot[None, :] * bias_slot, mask=live[:, None] & inside[None, :], other=0)
            if bias_ptr.dtype.element_ty == tl.int8:
                allowed = allowed & (given != 0)
            else:
                scores += given.to(tl.float32)
        scores = tl.where(allowed, scores, NEVER)
        peak = tl.maximum(largest, tl.reduce(scores, 1, _maximum))
        base = tl.where(peak == NEVER, 0.0, peak)
        shrunk = tl.exp(largest - base)
        weights = tl.exp(scores - base[:, None])
        total = total * shrunk + tl.reduce(weights, 1, _plus)
        v_row_at = v_at + slot[:, None].to(tl.int64) * v_row
        v = tl.load(v_row_at + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
        acc = _product(weights.to(v.dtype), v, acc * shrunk[:, None], WIDEN)
        largest = peak

    at = ((tl.program_id(1).to(tl.int64) * N * GROUP + row) * SPLITS + split).to(tl.int64)
    tl.store(parts_ptr + at[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv[None, :] < DV))
    tl.store(sums_ptr + 2 * at, largest, mask=live)
    tl.store(sums_ptr + 2 * at + 1, total, mask=live)


@triton.jit
def join_kernel(
    parts_ptr, sums_ptr, sinks_ptr, out_ptr, N,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the parts of one row, in the order of the splits: out [B, N, KEY_HEADS * GROUP, DV].

    sinks [KEY_HEADS * GROUP]: a score more in the sum alone. The grid is (N * GROUP, B * KEY_HEADS).
    """
    row, batch, key_head = tl.program_id(0), tl.program_id(1) // KEY_HEADS, tl.program_id(1) % KEY_HEADS
    node, head = row // GROUP, key_head * GROUP + row % GROUP
    split, dv = tl.arange(0, SPLITS), tl.arange(0, DV_PADDED)
    at = (tl.program_id(1).to(tl.int64) * N * GROUP + row) * SPLITS + split
    largest = tl.load(sums_ptr + 2 * at)
    peak = tl.reduce(largest, 0, _maximum)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        peak = tl.maximum(peak, sink)
    weight = tl.exp(largest - peak)
    total = tl.reduce(tl.load(sums_ptr + 2 * at + 1) * weight, 0, _plus)
    if sinks_ptr is not None:
        total += tl.exp(sink - peak)
    parts = tl.load(parts_ptr + at[:, None] * DV + dv[None, :], mask=dv[None, :] < DV, other=0.0)
    y = tl.reduce(parts * weight[:, None], 0, _plus) / total
    out_at = out_ptr + ((batch.to(tl.int64) * N + node) * KEY_HEADS * GROUP + head) * DV
    tl.store(out_at + dv, y.to(out_ptr.dtype.element_ty), mask=dv < DV)
