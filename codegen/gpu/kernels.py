"""Triton kernels of a product with weights in few bits; `accelc.codegen.gpu.quantized_gemm` launches them.

Y^T = W X^T: a tile of W is unpacked in registers and is the first operand of the matrix instruction, which lies there
already as the instruction wants it (`accelc.codegen.gpu.layout`); a tile of X passes through shared memory.

A code q becomes a float without a conversion: its bits are put into the mantissa of a constant. In bf16, 128 + q for
q < 16; in fp16, 1024 + q, or 64 + q for a code that lies four bits higher. What is too much is taken off in one of two
ways (`MODE`):

- "exact" subtracts it from each weight, one packed instruction for two of them;
- "biased" leaves it in, and subtracts base * sum(x) from the sum of a group. The sums of x come from the matrix unit: a
  second product whose first operand is all ones, in the very layout of the accumulators.

8-bit codes do not fit into bf16's mantissa. Bits 0 to 6 become 128 + low, and bit 7 becomes -128 or -256 by the
lowest bit of the exponent: the two add up to q - 128.

Triton's library functions (`tl.zeros`, `tl.sigmoid`, ...) are themselves compiled functions, which keeps a program from
being interpreted if triton was imported before; only built-in ones are used here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Outputs are written before the input is read for the last time: they may not share its register.
_ONE_TO_TWO, _ONE_TO_FOUR = tl.constexpr("=&r,=&r,r"), tl.constexpr("=&r,=&r,=&r,=&r,r")
_TWO_BF16, _FOUR_BF16 = tl.constexpr((tl.bfloat16,) * 2), tl.constexpr((tl.bfloat16,) * 4)
_TWO_FP16, _FOUR_FP16 = tl.constexpr((tl.float16,) * 2), tl.constexpr((tl.float16,) * 4)

# Two int16 elements, a register, to four registers of two bf16: 128 + code.
_INT4_BF16 = tl.constexpr("""{
.reg .b32 t;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
}""")
# The same, then code - 8: times one minus 136, which sm_80 has and sm_90 does at the speed of an addition.
_INT4_BF16_EXACT = tl.constexpr("""{
.reg .b32 t, one, off;
mov.b32 one, 0x3f803f80;
mov.b32 off, 0xc308c308;
lop3.b32 t, $4, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, t, one, off;
shr.u32 t, $4, 4;
lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $1, t, one, off;
shr.u32 t, $4, 8;
lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $2, t, one, off;
shr.u32 t, $4, 12;
lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $3, t, one, off;
}""")
# To fp16: 1024 + code, 64 + code, 1024 + code, 64 + code.
_INT4_FP16 = tl.constexpr("""{
.reg .b32 t;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $4, 0x00f000f0, 0x54005400, 0xea;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, t, 0x00f000f0, 0x54005400, 0xea;
}""")
_INT4_FP16_EXACT = tl.constexpr("""{
.reg .b32 t, u, far, near;
mov.b32 far, 0x64086408;
mov.b32 near, 0x54805480;
lop3.b32 t, $4, 0x000f000f, 0x64006400, 0xea;
sub.rn.f16x2 $0, t, far;
lop3.b32 t, $4, 0x00f000f0, 0x54005400, 0xea;
sub.rn.f16x2 $1, t, near;
shr.u32 u, $4, 8;
lop3.b32 t, u, 0x000f000f, 0x64006400, 0xea;
sub.rn.f16x2 $2, t, far;
lop3.b32 t, u, 0x00f000f0, 0x54005400, 0xea;
sub.rn.f16x2 $3, t, near;
}""")
# 8-bit codes to the two parts in bf16: 128 + low ($0, $1), and (not q & 0x80) | -128 ($2, $3).
_INT8_BF16 = tl.constexpr("""{
.reg .b32 t;
shr.u32 t, $4, 8;
lop3.b32 $0, $4, 0x007f007f, 0x43004300, 0xea;
lop3.b32 $1, t, 0x007f007f, 0x43004300, 0xea;
lop3.b32 $2, $4, 0x00800080, 0xc300c300, 0xae;
lop3.b32 $3, t, 0x00800080, 0xc300c300, 0xae;
}""")
_INT8_BF16_EXACT = tl.constexpr("""{
.reg .b32 t, u, v, one;
mov.b32 one, 0x3f803f80;
lop3.b32 u, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 v, $2, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 $0, u, one, v;
shr.u32 t, $2, 8;
lop3.b32 u, t, 0x007f007f, 0x43004300, 0xea;
lop3.b32 v, t, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 $1, u, one, v;
}""")
# 8-bit codes to fp16: the bytes of 1024 + code.
_INT8_FP16 = tl.constexpr("""{
prmt.b32 $0, $2, 0x64646464, 0x4240;
prmt.b32 $1, $2, 0x64646464, 0x4341;
}""")
_INT8_FP16_EXACT = tl.constexpr("""{
.reg .b32 t, off;
mov.b32 off, 0x64806480;
prmt.b32 t, $2, 0x64646464, 0x4240;
sub.rn.f16x2 $0, t, off;
prmt.b32 t, $2, 0x64646464, 0x4341;
sub.rn.f16x2 $1, t, off;
}""")


@triton.jit
def _arrange4(e0, e1, e2, e3, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """The four codes of int16 elements [units, bands, elements] in their places: [ROWS, COLS]."""
    w = tl.join(tl.join(e0, e1), tl.join(e2, e3))  # ..., row bit 3, column bit 3
    w = tl.reshape(w, (COLS // WIDE, ROWS // 64, 4, 8, 4, WIDE // 16, 2, 2, 2))
    return tl.reshape(tl.permute(w, (1, 2, 7, 3, 0, 5, 8, 4, 6)), (ROWS, COLS))


@triton.jit
def _arrange8(e0, e1, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """The two codes of int16 elements [units, bands, elements] in their places: [ROWS, COLS]."""
    w = tl.reshape(tl.join(e0, e1), (COLS // WIDE, ROWS // 64, 4, 8, 4, WIDE // 16, 2, 2, 2))
    return tl.reshape(tl.permute(w, (1, 2, 8, 3, 0, 5, 6, 4, 7)), (ROWS, COLS))


@triton.jit
def _mantissa(v, SHIFT: tl.constexpr, MASK: tl.constexpr, BASE: tl.constexpr, dtype: tl.constexpr):
    """Some bits of uint16 elements in the mantissa of the float whose bits are BASE."""
    return (((v >> SHIFT) & MASK) | BASE).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _less(e, amount):
    """e - amount, in fp32: the interpreter has no arithmetic of bf16."""
    return (e.to(tl.float32) - amount).to(e.dtype)


@triton.jit
def _unpack(
    v, dtype: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Codes int16 [units, bands, elements] as floats [ROWS, COLS]: code - middle where EXACT, else base + code."""
    if ASM:
        if BITS == 4:
            if dtype == tl.bfloat16:
                int4_bf16: tl.constexpr = _INT4_BF16_EXACT if EXACT else _INT4_BF16
                e0, e1, e2, e3 = tl.inline_asm_elementwise(
                    int4_bf16, _ONE_TO_FOUR, [v], _FOUR_BF16, is_pure=True, pack=2
                )
            else:
                int4_fp16: tl.constexpr = _INT4_FP16_EXACT if EXACT else _INT4_FP16
                e0, e1, e2, e3 = tl.inline_asm_elementwise(
                    int4_fp16, _ONE_TO_FOUR, [v], _FOUR_FP16, is_pure=True, pack=2
                )
            return _arrange4(e0, e1, e2, e3, ROWS, COLS, WIDE)
        else:
            if dtype == tl.bfloat16:
                int8_bf16: tl.constexpr = _INT8_BF16_EXACT
                e0, e1 = tl.inline_asm_elementwise(int8_bf16, _ONE_TO_TWO, [v], _TWO_BF16, is_pure=True, pack=2)
            else:
                int8_fp16: tl.constexpr = _INT8_FP16_EXACT if EXACT else _INT8_FP16
                e0, e1 = tl.inline_asm_elementwise(int8_fp16, _ONE_TO_TWO, [v], _TWO_FP16, is_pure=True, pack=2)
            return _arrange8(e0, e1, ROWS, COLS, WIDE)
    else:
        u = v.to(tl.uint16, bitcast=True)
        if BITS == 4:
            if dtype == tl.bfloat16:
                e0 = _mantissa(u, 0, 0xF, 0x4300, dtype)
                e1 = _mantissa(u, 4, 0xF, 0x4300, dtype)
                e2 = _mantissa(u, 8, 0xF, 0x4300, dtype)
                e3 = _mantissa(u, 12, 0xF, 0x4300, dtype)
            else:
                e0 = _mantissa(u, 0, 0xF, 0x6400, dtype)
                e1 = _mantissa(u, 0, 0xF0, 0x5400, dtype)
                e2 = _mantissa(u, 8, 0xF, 0x6400, dtype)
                e3 = _mantissa(u, 8, 0xF0, 0x5400, dtype)
            if EXACT:
                near: tl.constexpr = 136.0 if dtype == tl.bfloat16 else 72.0
                far: tl.constexpr = 136.0 if dtype == tl.bfloat16 else 1032.0
                e0, e1 = _less(e0, far), _less(e1, near)
                e2, e3 = _less(e2, far), _less(e3, near)
            return _arrange4(e0, e1, e2, e3, ROWS, COLS, WIDE)
        else:
            if dtype == tl.bfloat16:
                top0, top1 = _mantissa(u ^ 0x80, 0, 0x80, 0xC300, dtype), _mantissa(u ^ 0x8000, 8, 0x80, 0xC300, dtype)
                e0 = _less(_mantissa(u, 0, 0x7F, 0x4300, dtype), -top0.to(tl.float32))
                e1 = _less(_mantissa(u, 8, 0x7F, 0x4300, dtype), -top1.to(tl.float32))
            else:
                e0 = _mantissa(u, 0, 0xFF, 0x6400, dtype)
                e1 = _mantissa(u, 8, 0xFF, 0x6400, dtype)
                if EXACT:
                    e0, e1 = _less(e0, 1152.0), _less(e1, 1152.0)
            return _arrange8(e0, e1, ROWS, COLS, WIDE)


@triton.jit
def _unpack_parts(
    v, ASM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """8-bit codes int16 [units, bands, elements] as two bf16 tiles [ROWS, COLS] that add up to code - 128."""
    dtype: tl.constexpr = tl.bfloat16
    if ASM:
        low0, low1, top0, top1 = tl.inline_asm_elementwise(
            _INT8_BF16, _ONE_TO_FOUR, [v], _FOUR_BF16, is_pure=True, pack=2
        )
    else:
        u = v.to(tl.uint16, bitcast=True)
        low0, low1 = _mantissa(u, 0, 0x7F, 0x4300, dtype), _mantissa(u, 8, 0x7F, 0x4300, dtype)
        top0 = _mantissa(u ^ 0x80, 0, 0x80, 0xC300, dtype)
        top1 = _mantissa(u ^ 0x8000, 8, 0x80, 0xC300, dtype)
    return _arrange8(low0, low1, ROWS, COLS, WIDE), _arrange8(top0, top1, ROWS, COLS, WIDE)


@triton.jit
def _dot(w, x, acc, WIDEN: tl.constexpr):
    """w x + acc; in fp32 where WIDEN, for the interpreter, which has no products of bf16."""
    if WIDEN:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(w, x, acc)


@triton.jit
def _lane_values(ptr, band, groups, group, BANDS: tl.constexpr, TURNS: tl.constexpr):
    """Scales or zeros of a group, as stored: [BANDS, 64], or [BANDS, 32] int32 of two values of 16 bits.

    Two values are loaded as one: halves that are loaded one by one would be put together at once, where a value that is
    wanted an iteration later would be waited for.

    Where each warp holds rows of two bands (TURNS is 2) they are loaded one after the other: one tensor would be
    spread over the lanes otherwise, and go through shared memory to those that want it.
    """
    PAIRS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth == 16
    WIDTH: tl.constexpr = 32 if PAIRS else 64
    at = ptr.to(tl.pointer_type(tl.int32)) if PAIRS else ptr
    lane = tl.arange(0, WIDTH)[None, :]
    if TURNS == 1:
        return tl.load(at + (tl.reshape(band, (BANDS, 1)) * (groups * WIDTH) + lane) + group * WIDTH)
    else:
        HALF: tl.constexpr = BANDS // 2
        first, second = tl.split(tl.permute(tl.reshape(band, (2, HALF)), (1, 0)))
        both = tl.join(
            tl.load(at + (first[:, None] * (groups * WIDTH) + lane) + group * WIDTH),
            tl.load(at + (second[:, None] * (groups * WIDTH) + lane) + group * WIDTH),
        )
        return tl.reshape(tl.permute(both, (2, 0, 1)), (BANDS, WIDTH))


@triton.jit
def _rows(tile, ROWS: tl.constexpr, dtype: tl.constexpr):
    """What `_lane_values` gives of values of `dtype`, rows r and r + 8 side by side, as fp32 [ROWS, 1]."""
    if dtype == tl.float32:
        pairs = tl.reshape(tile, (ROWS // 64, 4, 8, 2))
    else:
        halves = tl.reshape(tile, (ROWS // 64, 4, 8))
        if dtype == tl.bfloat16:
            first = (halves << 16).to(tl.float32, bitcast=True)
            second = (halves & -65536).to(tl.float32, bitcast=True)
        else:
            first = halves.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            second = (halves >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        pairs = tl.join(first, second)
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (ROWS, 1))


@triton.jit
def _repeat(sums, TURNS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """[ROWS / TURNS, TOKENS] as [ROWS, TOKENS], TURNS times the same registers."""
    sums = tl.reshape(sums, (1, ROWS // TURNS, TOKENS))
    return tl.reshape(tl.broadcast_to(sums, (TURNS, ROWS // TURNS, TOKENS)), (ROWS, TOKENS))


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """The activation, in fp32."""
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # a NaN stays one
    return y


@triton.jit
def _finish(y, m, n, M, N, out_ptr, bias_ptr, residual_ptr, residual_stride, ACTIVATION: tl.constexpr):
    """Bias, activation and residual of sums y at rows m and columns n, which broadcast to y's shape; then store."""
    keep = (m < M) & (n < N)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y = _activate(y, ACTIVATION)
    if residual_ptr is not None:
        at = residual_ptr + m.to(tl.int64) * residual_stride + n
        y += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * N + n, y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _inputs(x_at, step, m, k, M, K, STEP: tl.constexpr, EVEN: tl.constexpr):
    """x [TOKENS, STEP] of a step; zeros from row M on, and beyond K."""
    if EVEN:
        return tl.load(x_at + step * STEP, mask=m[:, None] < M, other=0.0)
    else:
        return tl.load(x_at + step * STEP, mask=(m[:, None] < M) & (k[None, :] < K - step * STEP), other=0.0)


@triton.jit
def _step(
    acc, v, x, scale, zero, ones, excess,
    BITS: tl.constexpr, MODE: tl.constexpr, TWO: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr,
    WIDEN: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """The sums acc [ROWS, TOKENS] and the products of codes v [bands, units, elements] with x [TOKENS, STEP], scaled.

    Bands come first in memory, so that Triton gives them to the warps that hold their rows.

    A product starts from zero, and its sums are scaled and added, also where a row has one scale for all steps: sums
    carried from one product to the next let Triton leave products in flight across steps, while the registers of their
    operands are written anew.
    """
    TURNS: tl.constexpr = ROWS // (16 * WARPS)
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    v = tl.permute(v, (1, 0, 2))
    xt = tl.trans(x)
    nothing = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    if TWO:
        low, top = _unpack_parts(v, ASM, ROWS, STEP, WIDE)
        part = _dot(top, xt, _dot(low, xt, nothing, WIDEN), WIDEN)
    else:
        part = _dot(_unpack(v, x.dtype, BITS, MODE == "exact", ASM, ROWS, STEP, WIDE), xt, nothing, WIDEN)
    if SUMS:
        sums = _dot(ones, xt, tl.full((16 * WARPS, TOKENS), 0.0, tl.float32), WIDEN)
        totals = _repeat(sums, TURNS, ROWS, TOKENS)
        if zero is None:
            part -= (excess + MIDDLE) * totals
        else:
            part -= (excess + _rows(zero, ROWS, SCALES)) * totals
    return acc + part * _rows(scale, ROWS, SCALES)


# One kernel serves every number of tokens that takes the same tile.
@triton.jit(do_not_specialize=["M"])
def quantized_gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, out_ptr,
    M, N, K, x_stride, residual_stride, bands, units, groups, steps, steps_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, PARTIAL: tl.constexpr,
    WARPS: tl.constexpr, MODE: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, WGMMA: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs by TOKENS tokens, over a part of K.

    x [M, K] with rows `x_stride` apart; codes, scales and zeros of a TiledWeight; bias [N]; residual [M, N]; out
    [M, N], or, where PARTIAL, fp32 sums [splits, M, N] of parts of K without epilogue. The grid is (bands of ROWS,
    splits, blocks of TOKENS).
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UNIT: tl.constexpr = 4 * WIDE * BITS  # int16 elements of a unit
    BANDS: tl.constexpr = ROWS // 64
    UNITS: tl.constexpr = STEP // WIDE
    TURNS: tl.constexpr = ROWS // (16 * WARPS)  # how often all warps are needed, with 16 rows each, for a tile
    TWO: tl.constexpr = MODE == "biased" and BITS == 8 and dtype == tl.bfloat16
    BIASED: tl.constexpr = MODE == "biased" and not TWO
    SUMS: tl.constexpr = BIASED or zeros_ptr is not None

    band = tl.program_id(0) * BANDS + tl.arange(0, BANDS)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    band = tl.minimum(band, bands - 1)  # rows beyond the last band repeat it and are not stored
    begin = tl.program_id(1) * steps_per_split
    end = tl.minimum(begin + steps_per_split, steps)

    within = tl.arange(0, UNITS)[None, :, None] * UNIT + tl.arange(0, UNIT)[None, None, :]
    code_at = codes_ptr + band.to(tl.int64)[:, None, None] * units * UNIT + within  # [BANDS, UNITS, UNIT]
    k = tl.arange(0, STEP)
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]

    if dtype == tl.float16:
        # The base of a code depends on row bit 3.
        high = tl.reshape(tl.broadcast_to(tl.arange(0, 2)[None, :, None], (ROWS // 16, 2, 8)), (ROWS, 1))
        base = tl.where(high == 1, 64.0, 1024.0) if BITS == 4 else tl.full((ROWS, 1), 1024.0, tl.float32)
    else:
        base = tl.full((ROWS, 1), 128.0, tl.float32)
    # What a zero of the sums is in terms of what is summed: base + zero, or zero - middle.
    excess = base if BIASED else tl.full((ROWS, 1), -(1 << (BITS - 1)), tl.float32)

    acc = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    if ASM and WGMMA:
        # Ones that the compiler does not see through (no element is loaded: M is positive) stay in shared memory. A
        # constant would be moved into registers again for each instruction.
        at = tl.arange(0, 16 * WARPS)[:, None] * STEP + k[None, :]
        ones = tl.load(x_ptr + at, mask=at < -M, other=1.0)
    else:
        ones = tl.full((16 * WARPS, STEP), 1.0, tl.float32).to(dtype)
    RATIO: tl.constexpr = 1 if GROUP == 0 else GROUP // STEP
    SPAN: tl.constexpr = UNITS * UNIT
    SCALES: tl.constexpr = scales_ptr.dtype.element_ty
    final, last = end - 1, groups - 1
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Scales go straight to registers, one iteration ahead: they are too narrow for copies to shared memory. The
    # pipeliner takes loops only if what they carry is made in them. A second step beyond the end meets an x of zeros.
    at = 0 if GROUP == 0 else begin // RATIO
    s0 = _lane_values(scales_ptr, band, groups, at, BANDS, TURNS)
    if zeros_ptr is not None:
        z0 = _lane_values(zeros_ptr, band, groups, at, BANDS, TURNS)
    if UNROLL == 2 and GROUP != 0:
        at = tl.minimum((begin + 1) // RATIO, last)
        s1 = _lane_values(scales_ptr, band, groups, at, BANDS, TURNS)
        if zeros_ptr is not None:
            z1 = _lane_values(zeros_ptr, band, groups, at, BANDS, TURNS)
    for step in tl.range(begin, end, UNROLL, num_stages=STAGES):
        v0 = tl.load(code_at + step * SPAN)
        if UNROLL == 2:
            v1 = tl.load(code_at + tl.minimum(step + 1, final) * SPAN)
        x0 = _inputs(x_at, step, m, k, M, K, STEP, EVEN)
        if UNROLL == 2:
            x1 = _inputs(x_at, step + 1, m, k, tl.where(step < final, M, 0), K, STEP, EVEN)
        if GROUP != 0:
            at = tl.minimum((step + UNROLL) // RATIO, last)
            next_s0 = _lane_values(scales_ptr, band, groups, at, BANDS, TURNS)
            if zeros_ptr is not None:
                next_z0 = _lane_values(zeros_ptr, band, groups, at, BANDS, TURNS)
            if UNROLL == 2:
                at = tl.minimum((step + 3) // RATIO, last)
                next_s1 = _lane_values(scales_ptr, band, groups, at, BANDS, TURNS)
                if zeros_ptr is not None:
                    next_z1 = _lane_values(zeros_ptr, band, groups, at, BANDS, TURNS)
        zero = None if zeros_ptr is None else z0
        acc = _step(
            acc, v0, x0, s0, zero, ones, excess, BITS, MODE, TWO, SUMS, ROWS, TOKENS, STEP, WIDE, WARPS, ASM, WIDEN,
            SCALES,
        )  # fmt: skip
        if UNROLL == 2:
            scale = s0 if GROUP == 0 else s1
            if zeros_ptr is not None:
                zero = z0 if GROUP == 0 else z1
            acc = _step(
                acc, v1, x1, scale, zero, ones, excess, BITS, MODE, TWO, SUMS, ROWS, TOKENS, STEP, WIDE, WARPS, ASM,
                WIDEN, SCALES,
            )  # fmt: skip
        if GROUP != 0:
            s0 = next_s0
            if zeros_ptr is not None:
                z0 = next_z0
            if UNROLL == 2:
                s1 = next_s1
                if zeros_ptr is not None:
                    z1 = next_z1

    if not PARTIAL:
        _finish(acc, m[None, :], n[:, None], M, N, out_ptr, bias_ptr, residual_ptr, residual_stride, ACTIVATION)
    else:
        at = (tl.program_id(1) * M + m[None, :]).to(tl.int64) * N + n[:, None]
        tl.store(out_ptr + at, acc, mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit(do_not_specialize=["M"])
def split_sum_kernel(
    parts_ptr, bias_ptr, residual_ptr, out_ptr, M, N, residual_stride,
    SPLIT: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Partial sums fp32 [SPLIT, M, N] added in the order of the splits, and the epilogue: out [M, N].

    The grid is (N / COLUMNS rounded up, M).
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) + tl.arange(0, 1)
    y = tl.full((COLUMNS,), 0.0, tl.float32)
    for split in tl.static_range(SPLIT):
        y += tl.load(parts_ptr + (tl.cast(split, tl.int64) * M + m) * N + n, mask=n < N, other=0.0)
    _finish(y, m, n, M, N, out_ptr, bias_ptr, residual_ptr, residual_stride, ACTIVATION)
