"""Hand-made step programs: a Llama-shaped and a GPT-2-shaped decoder over the dialect, to compile and measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import accelc.ir.dialect  # noqa: F401  (registers the operations)

ops = torch.ops.accelc


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    vocab: int = 128
    slots: int = 128
    dtype: torch.dtype = torch.float32


LLAMA_1B = Shape(16, 2048, 32, 8, 64, 8192, 128256, 1024, torch.bfloat16)
SMALL_160M = Shape(12, 768, 12, 12, 64, 3072, 32000, 1024, torch.bfloat16)
DEMO = Shape(6, 256, 8, 4, 32, 704, 4096, 512, torch.float32)


class Step(nn.Module):
    """Tokens, positions, lengths and two caches a layer to logits. `plain`: GPT-2's layer instead of Llama's."""

    def __init__(self, shape: Shape, plain: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*size: int) -> nn.Parameter:
            value = torch.empty(size, dtype=shape.dtype).normal_(0, 0.4 / size[-1] ** 0.5, generator=generator)
            return nn.Parameter(value, requires_grad=False)

        self.shape, self.plain = shape, plain
        d, f, q, kv = shape.hidden, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.embedding = weight(shape.vocab, d)
        self.layers = nn.ModuleList()
        for _ in range(shape.layers):
            layer = nn.Module()
            sizes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "up": (f, d), "down": (d, f)}
            for name, size in sizes.items():
                layer.register_parameter(name, weight(*size))
                layer.register_parameter(f"{name}_bias", weight(size[0]) if plain else None)
            layer.register_parameter("gate", None if plain else weight(f, d))
            for name in ("norm1", "norm2"):
                layer.register_parameter(name, nn.Parameter(1 + 0.1 * weight(d).data, requires_grad=False))
            self.layers.append(layer)
        self.norm = nn.Parameter(1 + 0.1 * weight(d).data, requires_grad=False)
        angle = torch.arange(shape.slots)[:, None] * 1e4 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos().to(shape.dtype))
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin().to(shape.dtype))

    def norm_of(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.plain:
            return F.layer_norm(x, (x.shape[-1],), weight, None, 1e-5)
        return ops.rms_norm(x, weight, 1e-5, 0.0)

    def forward(self, tokens: Tensor, positions: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor]:
        s = self.shape
        b, n = tokens.shape
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        for i, w in enumerate(self.layers):
            y = self.norm_of(x, w.norm1)
            q = F.linear(y, w.q, w.q_bias).view(b, n, s.heads, s.head_dim).transpose(1, 2)
            k = F.linear(y, w.k, w.k_bias).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2)
            v = F.linear(y, w.v, w.v_bias).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2)
            if not self.plain:
                q, k = ops.rotary(q, cos, sin, False), ops.rotary(k, cos, sin, False)
            ops.cache_update(states[2 * i], k, lengths, 2)
            ops.cache_update(states[2 * i + 1], v, lengths, 2)
            a = ops.attention(
                q, states[2 * i], states[2 * i + 1], positions, lengths, None, None, None, None, "causal", 0,
                s.head_dim**-0.5, 0.0,
            )  # fmt: skip
            x = x + F.linear(a.transpose(1, 2).reshape(b, n, s.heads * s.head_dim), w.o, w.o_bias)
            y = self.norm_of(x, w.norm2)
            up = F.linear(y, w.up, w.up_bias)
            mixed = F.gelu(up) if self.plain else ops.gated_activation(F.linear(y, w.gate), up, "silu")
            x = x + F.linear(mixed, w.down, w.down_bias)
        return (F.linear(self.norm_of(x, self.norm), self.embedding),)

    def states(self, batch: int) -> list[Tensor]:
        s = self.shape
        size = (batch, s.kv_heads, s.slots, s.head_dim)
        return [torch.zeros(size, dtype=s.dtype) for _ in range(2 * s.layers)]


def capture(step: nn.Module, inputs: list[Tensor]) -> fx.GraphModule:
    """The step as a graph over aten and the dialect, batch and token count dynamic, parameters as get_attr."""
    states = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs[3:])
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = (both, both, {0: torch.export.Dim.DYNAMIC}, states)
    exported = torch.export.export(step, tuple(inputs), dynamic_shapes=shapes, strict=False)
    gm = exported.module(check_guards=False)
    gm.graph._codegen = fx.graph.CodeGen()  # plain positional arguments
    gm.recompile()
    return gm
