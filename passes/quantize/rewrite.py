"""Puts quantized weights into a graph: products and look-ups read codes in place of floats."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.ir.program import fetch, store
from accelc.ir.quantized import QuantizedWeight
from accelc.passes.quantize.products import Matrix, Product

aten = torch.ops.aten
ops = torch.ops.accelc


def rewrite(program: Program, matrix: Matrix, made: QuantizedWeight) -> int:
    """Let everything that reads the matrix read `made`, in place; returns how many products that were, or look-ups
    where there are none.
    """
    graph = program.graph
    dtype = fetch(program.module, matrix.path).dtype
    parts = _attributes(program, matrix.path, made)
    for product in matrix.products:
        with graph.inserting_before(product.node):
            new = _quantized(graph, product, parts, made)
        _exchange(product.node, new)
    for lookup in matrix.lookups:
        with graph.inserting_before(lookup):
            new = graph.call_function(
                ops.quantized_embedding.default, (lookup.args[1], *parts, made.scheme.bits, made.columns, dtype)
            )
        _exchange(lookup, new)
    return len(matrix.products) or len(matrix.lookups)


def stem(path: str) -> str:
    """Under what name the codes, scales and zeros of a weight are stored: beside it in its module."""
    return f"{path.removesuffix('.weight')}.quantized" if path.endswith(".weight") else f"{path}_quantized"


def _attributes(program: Program, path: str, made: QuantizedWeight) -> list[fx.Node | None]:
    """Attribute nodes of codes, scales and zeros; None for what the scheme does not have."""
    graph, first = program.graph, next(iter(program.graph.nodes))
    nodes: list[fx.Node | None] = []
    for part, tensor in (("codes", made.codes), ("scales", made.scales), ("zeros", made.zeros)):
        if tensor is None:
            nodes.append(None)
            continue
        name = f"{stem(path)}.{part}"
        store(program.module, name, tensor)
        with graph.inserting_before(first):
            nodes.append(graph.get_attr(name))
        nodes[-1].meta["val"] = tensor  # type: ignore[union-attr]
    return nodes


def _quantized(graph: fx.Graph, product: Product, parts: list[fx.Node | None], made: QuantizedWeight) -> fx.Node:
    bits, rows = made.scheme.bits, made.rows
    if product.kind == "linear":
        return graph.call_function(ops.quantized_linear.default, (product.x, *parts, product.bias, bits, rows))
    if product.kind == "grouped":
        return graph.call_function(ops.quantized_grouped_linear.default, (product.x, *parts, product.ends, bits, rows))
    experts = made.shape[0]
    each = graph.call_function(aten.sym_size.int, (product.x, 1))  # [E, M, K]: each expert has M rows
    beyond = graph.call_function(operator.add, (graph.call_function(operator.mul, (each, experts)), 1))
    device = made.codes.device
    ends = graph.call_function(aten.arange.start_step, (each, beyond, each), {"device": device})
    flat = graph.call_function(aten.reshape.default, (product.x, [-1, made.columns]))
    result = graph.call_function(ops.quantized_grouped_linear.default, (flat, *parts, ends, bits, rows))
    return graph.call_function(aten.reshape.default, (result, [experts, each, rows]))


def _exchange(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
