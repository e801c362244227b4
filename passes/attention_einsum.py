"""Einsums that mix tokens become permutations around one matrix product, so that they read like other attention."""

from __future__ import annotations

import torch
import torch.fx as fx

from accelc.passes.match import Builder, aten, is_call, same, shape


def einsums_to_products(graph: fx.Graph, length: torch.SymInt) -> None:
    """Rewrite every einsum of two tensors that has two dims of size `length` in an operand or its result."""
    builder = Builder()
    for node in list(graph.nodes):
        if not is_call(node, aten.einsum) or len(node.args[1]) != 2:  # type: ignore[arg-type]
            continue
        left, right = node.args[1]  # type: ignore[misc]
        if any(sum(same(size, length) for size in shape(n)) == 2 for n in (left, right, node)):
            product = _as_product(builder, node, str(node.args[0]).replace(" ", ""), left, right, length)
            if product is not None:
                node.replace_all_uses_with(product)
                graph.erase_node(node)


def _as_product(
    builder: Builder, node: fx.Node, equation: str, left: fx.Node, right: fx.Node, length: torch.SymInt
) -> fx.Node | None:
    """The einsum as permute, matmul, permute; None unless it has one row, one column and one contracted letter."""
    if "->" not in equation or "." in equation:
        return None
    operands, out = equation.split("->")
    a, b = operands.split(",")
    if any(len(set(letters)) != len(letters) for letters in (a, b, out)):
        return None  # diagonals
    contracted = [c for c in a if c in b and c not in out]
    columns = [c for c in b if c not in a and c in out]
    rows = [c for c in a if c not in b and c in out]
    if len(contracted) != 1 or len(columns) != 1 or set(a + b) != set(out) | set(contracted):
        return None
    if not rows:
        return None
    # The row is the dim of the tokens. Rows beyond it are groups of queries that share a key: they stand with the
    # batch dims and broadcast.
    row = next((c for c in rows if same(shape(left)[a.index(c)], length)), rows[-1])
    batch = [c for c in out if c not in (row, columns[0])]
    if any(c in columns for c in batch):
        return None
    x = builder.permute(node, left, [a.index(c) for c in (*batch, row, contracted[0])])
    shared = [c for c in batch if c in b]
    y = builder.permute(node, right, [b.index(c) for c in (*shared, contracted[0], columns[0])])
    for dim, c in enumerate(batch):
        if c not in b:
            y = builder.emit(node, aten.unsqueeze.default, y, dim)
    product = builder.emit(node, aten.matmul.default, x, y)
    order = [*batch, row, columns[0]]
    return builder.permute(node, product, [order.index(c) for c in out])
