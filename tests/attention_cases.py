"""Operands of `accelc::attention` of every kind, and what its kernels may lose on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelc.codegen.gpu.attention import Blocks, attention_gpu
from accelc.ir.dialect import attention_reference
from accelc.runtime.speculation.trees import Layout, Tree


def random_tree(size: int, seed: int) -> Layout:
    g = torch.Generator().manual_seed(seed)
    parents = [-1, *(int(torch.randint(0, node, (), generator=g)) for node in range(1, size))]
    return Tree(tuple(parents), tuple(range(size))).layout()


def operands(
    lengths: list[int], n: int, heads: int, key_heads: int, d: int, dv: int, *, dtype: torch.dtype = torch.float32,
    tree: bool = False, mask: str = "causal", window: int = 0, softcap: float = 0.0, bias: str = "",
    sinks: bool = False, slopes: bool = False, capacity: int = 0, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Operands of `accelc::attention`; what lies behind the new tokens is NaN, as nothing may read it."""
    g = torch.Generator().manual_seed(seed)
    b, slots = len(lengths), capacity or max(lengths) + n + 5
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    key, value = make(b, key_heads, slots, d), make(b, key_heads, slots, dv)
    for row, length in enumerate(lengths):
        key[row, :, length + n :] = torch.nan
        value[row, :, length + n :] = torch.nan
    depths, words = torch.arange(n)[None].expand(b, n), None
    if tree:
        layouts = [random_tree(n, seed + row) for row in range(b)]
        depths = torch.cat([layout.depths for layout in layouts])
        words = torch.cat([layout.words for layout in layouts])
    positions = torch.tensor(lengths)[:, None] + depths
    given_bias = None
    if bias == "float":
        given_bias = torch.randn(1, heads, 1, slots, generator=g)
    elif bias == "bool":
        given_bias = torch.rand(b, 1, n, slots, generator=g) < 0.8
        new = torch.tensor(lengths)[:, None, None, None] + torch.arange(n)[None, None, :, None]
        given_bias.scatter_(3, new, True)  # a token sees itself
    return (make(b, heads, n, d), key, value, positions.contiguous(), torch.tensor(lengths), words, given_bias,
            make(heads) if sinks else None, torch.rand(heads, generator=g) if slopes else None, mask, window,
            d**-0.5, softcap)  # fmt: skip


def error(given: tuple[Any, ...], blocks: Blocks | None = None, device: str = "cpu") -> float:
    """The largest error as a part of what rounding may lose.

    Weights of at most 1 and sums of them are rounded to value's dtype, the result once more; in the interpreter, which
    truncates what it stores as bf16, by twice as much.
    """
    dtype = given[0].dtype
    wide = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given)
    value = wide[2].clone()
    for row, length in enumerate(given[4].tolist()):
        end = length + given[0].shape[2]
        wide[1][row, :, end:], value[row, :, end:] = 0.0, 0.0
    want = attention_reference(*wide[:2], value, *wide[3:])
    moved = [t.to(device) if isinstance(t, Tensor) else t for t in given]
    got = attention_gpu(*moved, blocks=blocks).cpu()
    assert (got.shape, got.dtype) == (want.shape, dtype)
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    return float((got.double() - want).abs().max() / (unit * 2 * value.abs().max()))


CASES: dict[str, dict[str, Any]] = {
    "one token": {"lengths": [7], "n": 1},
    "several rows of a batch": {"lengths": [0, 3, 70, 41], "n": 1},
    "a chunk": {"lengths": [0, 37], "n": 19},
    "a tree": {"lengths": [9, 33], "n": 12, "tree": True},
    "a large tree": {"lengths": [40], "n": 70, "tree": True, "heads": 2, "key_heads": 1},
    "window": {"lengths": [90, 5], "n": 7, "tree": True, "mask": "window", "window": 11},
    "chunks": {"lengths": [90, 6], "n": 9, "mask": "chunk", "window": 16},
    "alibi": {"lengths": [33, 1], "n": 5, "tree": True, "slopes": True},
    "soft cap": {"lengths": [33, 1], "n": 5, "softcap": 3.0},
    "sinks": {"lengths": [33, 0], "n": 5, "tree": True, "sinks": True, "mask": "window", "window": 4},
    "bias": {"lengths": [33, 1], "n": 5, "bias": "float"},
    "bool bias": {"lengths": [33, 1], "n": 5, "bias": "bool", "tree": True},
    "no group": {"lengths": [20], "n": 3, "heads": 3, "key_heads": 3},
    "one key head": {"lengths": [20], "n": 3, "heads": 5, "key_heads": 1},
    "heads of 96": {"lengths": [20], "n": 2, "d": 96, "dv": 80},
    "latent": {"lengths": [20], "n": 2, "heads": 4, "key_heads": 1, "d": 80, "dv": 64},
    "small heads": {"lengths": [20], "n": 2, "d": 8, "dv": 8},
}
