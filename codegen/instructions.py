"""Instructions of compiled steps, and the rules that turn operations into them.

A rule gets the operation's arguments (tensors as `Array`) and its output, and returns instructions, or None where the
kernels do not cover the case: then torch computes the operation. Further rules are in `products` and `positions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accelc.codegen.arrays import BY_ITEMSIZE, CODES, FLOATS, MAX_DIMS, Array, contiguous, merge_together

OPS = (
    "linear", "attention", "norm", "rotary", "pointwise", "copy", "gather", "cache_update",
    "product", "softmax", "map", "index", "key_positions", "visible", "quantized_linear",
    "quantized_embedding", "dequantize", "top_k",
    "draw",
)  # fmt: skip
"""In the order of OPS in codegen/cpu/kernels.cpp."""

MASKS = {"causal": 0, "window": 1, "chunk": 2}
UNARY = ("keep", "neg", "exp", "silu", "sigmoid", "tanh", "gelu", "gelu_tanh", "relu", "rsqrt", "square")
BINARY = ("first", "add", "sub", "mul", "div", "rsub")
MAP = (
    "first", "add", "sub", "mul", "floor_divide", "remainder", "lt", "le", "gt", "ge", "eq", "ne",
    "and", "or", "xor", "where", "clamp",
)  # fmt: skip
"""In the order of Map in codegen/cpu/map.h."""
SPLITS, TILE = 16, 16
"""Of codegen/cpu/attention.h."""


@dataclass(frozen=True)
class Instruction:
    """One call of a kernel: `arrays[i]` for i in `writes` are written, the others read; None is an absent optional."""

    op: str
    arrays: tuple[Array | None, ...]
    writes: tuple[int, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    raw: bool = False
    """Copies bytes: dtypes matter by their width alone."""


@dataclass(frozen=True)
class Gemm:
    """out = x @ weight.mT (+ bias), by torch; matrices, or one of each a batch element."""

    x: Array
    weight: Array
    bias: Array | None
    out: Array


@dataclass(frozen=True)
class Scratch:
    """A temporary that lives during one instruction: fp32 values."""

    elements: int

    ROOT = -1


Rule = Callable[..., Sequence[Instruction] | None]
RULES: dict[Any, Rule] = {}
aten, ops = torch.ops.aten, torch.ops.accelc


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule: rule(out, *args, **kwargs)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def floats(*arrays: Any) -> bool:
    """Whether all arrays (numbers and None aside) have a float dtype and few enough dims for the kernels."""
    return all(not isinstance(a, Array) or (a.dtype in FLOATS and a.ndim <= MAX_DIMS) for a in arrays)


def scratch(elements: int) -> Array:
    """An array that the planner puts into memory for one instruction."""
    return Array(Scratch.ROOT, torch.float32, 0, (elements,), (1,))


# -- attention -------------------------------------------------------------------------------------------------------


@rule(ops.attention.default)
def attention(
    out: Array, query: Array, key: Array, value: Array, positions: Array, lengths: Array, tree: Array | None,
    bias: Array | None, sinks: Array | None, slopes: Array | None, mask: str, window: int, scale: float, softcap: float,
) -> Sequence[Instruction] | None:  # fmt: skip
    b, h, n, _ = query.size
    whole = (positions, lengths) if tree is None else (positions, lengths, tree)
    if (
        not floats(query, key, value, sinks, slopes)
        or key.dtype != value.dtype
        or any(a.dtype != torch.int64 for a in whole)
    ):
        return None
    if bias is not None:
        if bias.dtype not in (*FLOATS, torch.bool):
            return None
        bias = bias.expand((b, h, n, key.size[2]))
    if not (query.unit and key.unit and value.unit):
        return None
    tiles = b * key.size[1] * -(-(h // key.size[1]) * n // TILE)
    # Enough tiles for a few threads need no splitting of the context.
    parts = scratch(tiles * SPLITS * TILE * (value.size[3] + 2)) if tiles < 4 * torch.get_num_threads() else None
    arrays = (query, key, value, positions, lengths, tree, bias, sinks, slopes, out, parts)
    return [Instruction("attention", arrays, (9, 10) if parts else (9,), (MASKS[mask], window), (scale, softcap))]


# -- rows --------------------------------------------------------------------------------------------------------------


@rule(ops.rms_norm.default)
def rms_norm(out: Array, x: Array, weight: Array | None, eps: float, weight_offset: float):
    if not floats(out, x, weight) or not x.unit:
        return None
    return [Instruction("norm", (x, weight, None, out), (3,), (0,), (eps, weight_offset))]


@rule(aten.layer_norm.default)
def layer_norm(
    out: Array, x: Array, shape: Sequence[int], weight: Array | None = None, bias: Array | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
):  # fmt: skip
    if not floats(out, x, weight, bias) or len(shape) != 1 or not x.unit:
        return None
    return [Instruction("norm", (x, weight, bias, out), (3,), (1,), (eps, 0.0))]


@rule(ops.rotary.default)
def rotary(out: Array, x: Array, cos: Array, sin: Array, interleaved: bool):
    if not floats(out, x, cos, sin) or x.size != out.size:
        return None
    cos, sin = cos.expand(x.size), sin.expand(x.size)
    if not (x.unit and cos.unit and sin.unit):
        return None
    return [Instruction("rotary", (x, cos, sin, out), (3,), (int(interleaved),))]


def pointwise(out: Array, a: Any, b: Any = None, unary: str = "keep", binary: str = "first", alpha: float = 1.0):
    """out = binary(unary(a), alpha * b); b an array, a number or None."""
    if not isinstance(a, Array) or not floats(out, a, b) or isinstance(alpha, complex):
        return None
    number = float(b) if isinstance(b, int | float) else 0.0
    other = b.expand(out.size) if isinstance(b, Array) else None
    first, second, into = merge_together((a.expand(out.size), other, out))
    codes = (UNARY.index(unary), BINARY.index(binary))
    return [Instruction("pointwise", (first, second, into), (2,), codes, (float(alpha), number))]


def mapped(out: Array, a: Any, op: str, b: Any = None, c: Any = None) -> Sequence[Instruction] | None:
    """out = op(a, b, c) for positions and masks; b and c arrays or numbers."""
    arrays = [x for x in (a, b, c, out) if isinstance(x, Array)]
    numbers = [0 if x is None or isinstance(x, Array) else x for x in (b, c)]
    if not isinstance(a, Array) or any(x.dtype not in CODES or x.ndim > MAX_DIMS for x in arrays):
        return None
    if any(isinstance(x, complex) for x in numbers):
        return None
    integer = all(x.dtype not in FLOATS for x in arrays[:-1]) and all(isinstance(x, int) for x in numbers)
    whole = [int(x) if integer else 0 for x in numbers]
    operands = [x.expand(out.size) if isinstance(x, Array) else None for x in (a, b, c)]
    ints = (MAP.index(op), int(integer), *whole)
    return [Instruction("map", (*merge_together((*operands, out)),), (3,), ints, tuple(map(float, numbers)))]


def arithmetic(out: Array, a: Any, b: Any, op: str, alpha: float = 1.0) -> Sequence[Instruction] | None:
    """A binary operation, by the fast kernel for values or the exact one for positions."""
    if floats(out, a, b):
        return pointwise(out, a, b, binary=op, alpha=alpha)
    return mapped(out, a, op, b) if alpha == 1 and op in MAP else None


for name in ("neg", "exp", "silu", "sigmoid", "tanh", "relu", "rsqrt"):
    rule(getattr(aten, name).default)(lambda out, a, unary=name: pointwise(out, a, unary=unary))


@rule(aten.gelu.default)
def gelu(out: Array, a: Array, approximate: str = "none"):
    return pointwise(out, a, unary="gelu_tanh" if approximate == "tanh" else "gelu")


@rule(aten.pow.Tensor_Scalar)
def power(out: Array, a: Array, exponent: float):
    return pointwise(out, a, unary="square") if exponent == 2 else None


@rule(aten.add.Tensor, aten.add.Scalar)
def add(out: Array, a: Any, b: Any, alpha: float = 1):
    return arithmetic(out, a, b, "add", alpha)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(out: Array, a: Any, b: Any, alpha: float = 1):
    return arithmetic(out, a, b, "sub", alpha)


@rule(aten.rsub.Scalar)
def rsub(out: Array, a: Any, b: Any, alpha: float = 1):
    return pointwise(out, a, b, binary="rsub") if alpha == 1 else None


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(out: Array, a: Any, b: Any):
    return arithmetic(out, a, b, "mul")


@rule(aten.div.Tensor, aten.div.Scalar)
def div(out: Array, a: Any, b: Any):
    return pointwise(out, a, b, binary="div")


@rule(ops.gated_activation.default)
def gated_activation(out: Array, gate: Array, up: Array, kind: str):
    return pointwise(out, gate, up, unary=kind, binary="mul") if kind in UNARY else None


# -- moving ------------------------------------------------------------------------------------------------------------


def copy(out: Array, a: Array) -> Sequence[Instruction] | None:
    """The same values in other memory."""
    source, into = merge_together((a, out))
    if source is None or into is None or into.ndim > MAX_DIMS or a.dtype.itemsize not in BY_ITEMSIZE:
        return None
    return [Instruction("copy", (source, into), (1,), raw=True)]


@rule(aten.clone.default, aten.contiguous.default)
def clone(out: Array, a: Array, memory_format: Any = None):
    return copy(out, a)


@rule(aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int)
def reshape(out: Array, a: Array, *shape: Any):
    return copy(Array(out.root, out.dtype, out.offset, a.size, contiguous(a.size)), a)


@rule(aten._to_copy.default, aten.to.dtype)
def convert(out: Array, a: Array, *args: Any, **kwargs: Any):
    if a.dtype == out.dtype:
        return copy(out, a)
    return pointwise(out, a) if floats(out, a) else mapped(out, a, "first")


@rule(aten.cat.default)
def cat(out: Array, parts: Sequence[Array], dim: int = 0):
    at = 0
    instructions: list[Instruction] = []
    for part in parts:
        if part.dtype != out.dtype or part.ndim != out.ndim:
            return None
        piece = copy(out.narrow(dim % out.ndim, at, part.size[dim]), part)
        if piece is None:
            return None
        instructions += piece
        at += part.size[dim]
    return instructions


@rule(aten.stack.default)
def stack(out: Array, parts: Sequence[Array], dim: int = 0):
    return cat(out, [part.unsqueeze(dim % out.ndim) for part in parts], dim)


@rule(aten.repeat.default)
def repeat(out: Array, a: Array, times: Sequence[int]):
    size = (1,) * (len(times) - a.ndim) + a.size
    tiles = tuple(x for pair in zip(times, size) for x in pair)
    source = a.expand(size)
    for dim in range(len(times)):
        source = source.unsqueeze(2 * dim)
    return copy(out.viewed(tiles), source.expand(tiles)) if out.numel else []


@rule(aten.embedding.default)
def embedding(
    out: Array, weight: Array, indices: Array, padding_idx: int = -1, scale: bool = False, sparse: bool = False
):
    return _gather(out, weight, indices)


def _gather(out: Array, table: Array, indices: Array) -> Sequence[Instruction] | None:
    if (
        indices.dtype != torch.int64
        or table.stride != contiguous(table.size)
        or table.dtype.itemsize not in BY_ITEMSIZE
    ):
        return None
    flat = indices.matrix(inner=0)
    if flat is None:
        return None
    width = table.numel // max(table.size[0], 1)
    flat = Array(flat.root, flat.dtype, flat.offset, flat.size[:1], flat.stride[:1])
    arrays = (table.viewed((table.size[0], width)), flat, out.viewed((indices.numel, width)))
    return [Instruction("gather", arrays, (2,), raw=True)]


@rule(ops.cache_update.default)
def cache_update(out: None, cache: Array, value: Array, lengths: Array, dim: int):
    same = cache.dtype == value.dtype and cache.dtype.itemsize in BY_ITEMSIZE
    if not same and not floats(cache, value):
        return None
    if lengths.dtype != torch.int64 or cache.ndim > MAX_DIMS:
        return None
    return [Instruction("cache_update", (cache, value, lengths), (0,), (dim % cache.ndim,), raw=same)]


@rule(ops.scatter_rows.default)
def scatter_rows(out: None, table: Array, rows: Array, values: Array):
    """One cache of all rows for each of them, in which it starts where it says."""
    caches = table.unsqueeze(0).expand((values.size[0], *table.size))
    return cache_update(out, caches, values.unsqueeze(1), rows, 1)


def code(array: Array, raw: bool) -> int:
    """The dtype code that a kernel sees."""
    return CODES[array.dtype] if array.dtype in CODES else BY_ITEMSIZE[array.dtype.itemsize] if raw else -1
