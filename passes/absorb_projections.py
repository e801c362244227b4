"""AbsorbProjections: attention over a latent, by re-association q (W c)^T = (q W^T) c^T."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Exactness, Program
from accelc.ir.program import fetch, store
from accelc.passes.base import Pass, PassResult
from accelc.passes.match import Builder
from accelc.passes.registry import register_pass
from accelc.passes.step.cut import Rates

accelc = torch.ops.accelc
aten = torch.ops.aten

VIEWS = {
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor,
    aten.split_with_sizes.default, aten.split.Tensor, aten.unsqueeze.default, aten.squeeze.dims, aten.select.int,
    aten.clone.default, aten.contiguous.default, operator.getitem, aten.chunk.default,
    aten.unbind.int,
}  # fmt: skip
"""Operations that only rearrange the features of a projection."""


@dataclass(frozen=True)
class Projected:
    """A value [B, H, T, D] that is a projection of a latent: y[b, h, t] = weight[rows[h]] latent[b, t]."""

    latent: fx.Node
    weight: fx.Node
    rows: Tensor
    """Rows of the weight [H, D]."""

    def matrix(self, program: Program) -> Tensor:
        """The weight by head: [H, D, R]."""
        return fetch(program.module, str(self.weight.target)).detach()[self.rows.to(torch.int64)]


@dataclass(frozen=True)
class Part:
    """A run of the key's features: projected from a latent, or the same for all heads [B, 1, T, D]."""

    width: int
    projected: Projected | None
    shared: fx.Node | None


@register_pass
@dataclass(frozen=True)
class AbsorbProjections(Pass):
    """Where keys and values are projections of one latent, attend to the latent itself when that is modelled faster.

    Queries are multiplied by the key projection and results by the value projection, so that the latent (and whatever
    part of the keys all heads share, such as its rotary part) is all that has to be cached: this is how multi-head
    latent attention (DeepSeek-V2, section 2.1) is meant to run. Attention then has one key head. Modelled per past
    token: bytes read and arithmetic, before and after. Projections with a bias, and keys changed after the
    projection, are left alone.
    """

    name = "absorb_projections"
    after = ("normalise", "raise_attention")
    before = ("derive_step",)
    exactness = Exactness.EXACT
    expected_matches = (0, None)

    bytes_per_second: float = Rates.bytes
    flops_per_second: float = Rates.flops

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        scatters_to_cat(program.graph)
        matches, notes = 0, []
        for node in list(program.graph.nodes):
            if node.target is not accelc.full_attention.default:
                continue
            found = self._match(program, node)
            if found is None:
                continue
            parts, value = found
            before, after = self._times(node, parts, value)
            latent = f"{value.latent.name} [{_width(value.latent)}]"
            notes.append(
                f"{node.name}: {before * 1e9:.1f} ns a past token per head's keys, {after * 1e9:.1f} ns over {latent}"
            )
            if after < before:
                _rewrite(program, node, parts, value)
                matches += 1
        program.graph.eliminate_dead_code()
        program.module.recompile()
        return PassResult(program, matches, tuple(notes))

    def _match(self, program: Program, node: fx.Node) -> tuple[list[Part], Projected] | None:
        query, key, value = node.args[:3]
        heads = query.meta["val"].shape[1]
        if key.meta["val"].shape[1] != heads or value.meta["val"].shape[1] != heads:
            return None
        projected_value = projection(value)
        pieces = key.args[0] if key.target is aten.cat.default and key.args[1] in (-1, 3) else [key]
        parts = [_part(piece) for piece in pieces]
        if projected_value is None or any(part is None for part in parts):
            return None
        latents = [p.projected.latent for p in parts if p is not None and p.projected is not None]
        if not latents or any(latent is not projected_value.latent for latent in latents):
            return None
        return [p for p in parts if p is not None], projected_value

    def _times(self, node: fx.Node, parts: list[Part], value: Projected) -> tuple[float, float]:
        """Modelled seconds a past token: reading per-head keys and values, and reading the latent."""
        query, key = node.args[0].meta["val"], node.args[1].meta["val"]
        heads, width = int(query.shape[1]), int(key.shape[-1])
        depth = int(node.meta["val"].shape[-1])
        rank, itemsize = _width(value.latent), key.dtype.itemsize
        shared = sum(p.width for p in parts if p.shared is not None)

        def seconds(numbers: int, products: int) -> float:
            return numbers * itemsize / self.bytes_per_second + 2 * products / self.flops_per_second

        before = seconds(heads * (width + depth), heads * (width + depth))
        return before, seconds(rank + shared, heads * (rank + shared + rank))


def projection(value: fx.Node) -> Projected | None:
    """`value` [B, H, T, D] as a rearranged bias-free linear of a latent, or None."""
    chain = []
    node = value
    while node.target in VIEWS:
        chain.append(node)
        node = node.args[0]
    if node.target is not aten.linear.default or (len(node.args) > 2 and node.args[2] is not None):
        return None
    if node.args[1].op != "get_attr":
        return None
    features = node.meta["val"].shape[-1]
    # Follow the numbers of the features through the views, at sizes B = T = 1.
    env: dict[fx.Node, Any] = {node: torch.arange(features).reshape([1] * (node.meta["val"].dim() - 1) + [-1])}
    for step in reversed(chain):
        args, kwargs = fx.map_arg((step.args, step.kwargs), lambda n: env.get(n, 1))
        try:
            env[step] = step.target(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return None
    rows = env[value]
    if not isinstance(rows, Tensor) or rows.dim() != 4 or rows.shape[0] != 1 or rows.shape[2] != 1:
        return None
    return Projected(node.args[0], node.args[1], rows[0, :, 0])


def scatters_to_cat(graph: fx.Graph) -> None:
    """A buffer filled part by part along its last dim (slice_scatter chains of functionalised writes) is a cat of the
    parts.
    """
    for node in list(graph.nodes):
        if node.target is not aten.slice_scatter.default or any(
            u.target is aten.slice_scatter.default for u in node.users
        ):
            continue
        parts: dict[int, tuple[int, fx.Node]] = {}
        last, link = node.meta["val"].dim() - 1, node
        width = node.meta["val"].shape[-1]
        while link.target is aten.slice_scatter.default and link.args[2] in (last, -1):
            start, end = link.args[3] or 0, min(link.args[4] if len(link.args) > 4 else width, width)
            written = link.args[1]
            if written.target is aten.copy.default:
                written = written.args[1]
            parts.setdefault(start, (end, written))
            link = link.args[0]
        ordered = [(start, *parts[start]) for start in sorted(parts)]
        ends = [end for _, end, _ in ordered]
        starts = [start for start, _, _ in ordered]
        same = all(p.meta["val"].dtype == node.meta["val"].dtype for _, _, p in ordered)
        if not ordered or starts != [0, *ends[:-1]] or ends[-1] != width or not same:
            continue
        with graph.inserting_before(node):
            joined = graph.call_function(aten.cat.default, ([p for _, _, p in ordered], last))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
    graph.eliminate_dead_code()


def _part(node: fx.Node) -> Part | None:
    width = int(node.meta["val"].shape[-1])
    if node.target is aten.expand.default and node.args[0].meta["val"].shape[1] == 1:
        return Part(width, None, node.args[0])
    projected = projection(node)
    return None if projected is None else Part(width, projected, None)


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _rewrite(program: Program, node: fx.Node, parts: list[Part], value: Projected) -> None:
    """Replace the attention by one over [latent, shared parts] with a single key head."""
    graph = program.graph
    query, _, _, *rest = node.args
    call = functools.partial(Builder().emit, node)
    with graph.inserting_before(node):

        def constant(name: str, tensor: Tensor) -> fx.Node:
            path = f"accelc_tables.{name}_{node.name}"
            store(program.module, path, tensor.contiguous())
            attribute = graph.get_attr(path)
            attribute.meta["val"] = node.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
            return attribute

        absorbed, others, shared, at = None, [], [], 0
        for i, part in enumerate(parts):
            piece = query if len(parts) == 1 else call(aten.slice.Tensor, query, 3, at, at + part.width)
            at += part.width
            if part.projected is not None:
                product = call(aten.matmul.default, piece, constant(f"key{i}", part.projected.matrix(program)))
                absorbed = product if absorbed is None else call(aten.add.Tensor, absorbed, product)
            else:
                others.append(piece)
                shared.append(part.shared)
        latent = value.latent
        if latent.meta["val"].dim() == 3:
            latent = call(aten.unsqueeze.default, latent, 1)
        queries = call(aten.cat.default, [absorbed, *others], -1) if others else absorbed
        keys = call(aten.cat.default, [latent, *shared], -1) if shared else latent
        values = call(aten.slice.Tensor, keys, 3, 0, _width(latent)) if shared else keys
        attended = call(accelc.full_attention.default, queries, keys, values, *rest)
        back = constant("value", value.matrix(program).transpose(-1, -2))  # [H, R, Dv]
        result = call(aten.matmul.default, attended, back)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
