"""What a node does to the rows of its arguments, which decides what it can share a kernel with."""

from __future__ import annotations

import enum

import torch
import torch.fx as fx

from accelc.ir.dialect import UPDATES
from accelc.ir.operators import GROUPED, schema_name

aten = torch.ops.aten
ops = torch.ops.accelc


class Role(enum.Enum):
    """Of a node that computes something."""

    PRODUCT = "product"
    """Rows times a weight."""
    ATTENTION = "attention"
    """Reads a cache."""
    ROWS = "rows"
    """Each row from all of its elements: norms, softmax, sums over the last dim."""
    ELEMENTS = "elements"
    """Each element from the elements in its place, or, as rotary embeddings do, from some of its row."""
    LOOKUP = "lookup"
    """Rows of a table."""
    WRITE = "write"
    """New rows of a state."""
    CHOICE = "choice"
    """Places of the largest elements of a row."""
    OTHER = "other"
    """Anything else."""


PRODUCTS = {
    aten.linear.default, aten.addmm.default, aten.mm.default, ops.quantized_linear.default,
}  # fmt: skip
WEIGHTED = {aten.matmul.default, aten.bmm.default}
"""Products where an argument is a weight."""
REDUCTIONS = {
    ops.rms_norm.default, aten.layer_norm.default, aten.native_layer_norm.default, aten.softmax.int,
    aten._softmax.default, aten.log_softmax.int, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default,
    aten.cumsum.default,
}  # fmt: skip
MOVES = {
    ops.rotary.default, ops.gated_activation.default, aten.cat.default, aten.stack.default, aten.clone.default,
    aten._to_copy.default, aten.to.dtype, aten.contiguous.default, aten.reshape.default, aten.flatten.using_ints,
    aten.repeat_interleave.self_int,
}  # fmt: skip
"""Element by element, or a copy in another order within a row."""
LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, ops.quantized_embedding.default}
CHOICES = {ops.top_k.default, aten.argmax.default, aten.topk.default}


def role_of(node: fx.Node, is_weight: dict[fx.Node, bool]) -> Role:
    """The role of a node that computes a tensor; `is_weight`: whether values are attributes, or views of them."""
    target = node.target
    if target in UPDATES:
        return Role.WRITE
    if target in PRODUCTS or by_expert(node):
        return Role.PRODUCT
    if target in WEIGHTED and any(is_weight.get(n, False) for n in node.all_input_nodes):
        return Role.PRODUCT
    if target is ops.attention.default:
        return Role.ATTENTION
    if target in CHOICES:
        return Role.CHOICE
    if target in LOOKUPS:
        return Role.LOOKUP
    if target in REDUCTIONS:
        return Role.ROWS if _over_last(node) else Role.OTHER
    if target in MOVES or (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags):
        return Role.ELEMENTS
    return Role.OTHER


def by_expert(node: fx.Node) -> bool:
    """Whether a node multiplies rows that are sorted by expert."""
    return node.target is ops.quantized_grouped_linear.default or schema_name(node.target) in GROUPED


def product_rows(product: fx.Node) -> fx.Node:
    """The argument of a product that has the rows."""
    return product.args[1 if product.target is aten.addmm.default else 0]  # type: ignore[return-value]


def _over_last(node: fx.Node) -> bool:
    """Whether a reduction is over the last dim alone."""
    if node.target in (ops.rms_norm.default, aten.layer_norm.default, aten.native_layer_norm.default):
        return node.target is ops.rms_norm.default or len(node.args[1]) == 1  # type: ignore[arg-type]
    dims = node.args[1]
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])] == [rank - 1]  # type: ignore[operator]
