"""Puts quantized weights into a graph: products and look-ups read codes in place of floats."""

from __future__ import annotations

import operator
from dataclasses import dataclass

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
    codes = Codes(tuple(parts), made.scheme.bits, made.rows, made.columns, made.shape[0], made.codes.device)
    for product in matrix.products:
        with graph.inserting_before(product.node):
            new = quantized_product(graph, product, codes)
        exchange(product.node, new)
    for lookup in matrix.lookups:
        with graph.inserting_before(lookup):
            new = graph.call_function(
                ops.quantized_embedding.default, (lookup.args[1], *parts, made.scheme.bits, made.columns, dtype)
            )
        exchange(lookup, new)
    return len(matrix.products) or len(matrix.lookups)


def stem(path: str) -> str:
    """Under what name the codes, scales and zeros of a weight are stored: beside it in its module."""
    return f"{path.removesuffix('.weight')}.quantized" if path.endswith(".weight") else f"{path}_quantized"


def _free_stem(program: Program, path: str) -> str:
    """The stem of a weight, longer where the model has something of that name."""
    name, taken = stem(path), program.tensors()
    while any(each == name or each.startswith(f"{name}.") for each in taken):
        name += "_"
    return name


def _attributes(program: Program, path: str, made: QuantizedWeight) -> list[fx.Node | None]:
    """Attribute nodes of codes, scales and zeros; None for what the scheme does not have."""
    graph, first = program.graph, next(iter(program.graph.nodes))
    nodes: list[fx.Node | None] = []
    base = _free_stem(program, path)
    for part, tensor in (("codes", made.codes), ("scales", made.scales), ("zeros", made.zeros)):
        if tensor is None:
            nodes.append(None)
            continue
        name = f"{base}.{part}"
        store(program.module, name, tensor)
        with graph.inserting_before(first):
            nodes.append(graph.get_attr(name))
        nodes[-1].meta["val"] = tensor  # type: ignore[union-attr]
    return nodes


@dataclass(frozen=True)
class Codes:
    """A quantized weight [N, K], or a stack of them [E, N, K], in a graph."""

    parts: tuple[fx.Node | None, ...]
    """Codes, scales and zeros."""
    bits: int
    rows: int
    columns: int
    experts: int
    """E; of a stack alone."""
    device: torch.device


def quantized_product(graph: fx.Graph, product: Product, codes: Codes) -> fx.Node:
    """The product with codes, where nodes are inserted now."""
    parts, bits, rows = codes.parts, codes.bits, codes.rows
    if product.kind == "linear":
        return graph.call_function(ops.quantized_linear.default, (product.x, *parts, product.bias, bits, rows))
    if product.kind == "grouped":
        return graph.call_function(ops.quantized_grouped_linear.default, (product.x, *parts, product.ends, bits, rows))
    each = graph.call_function(aten.sym_size.int, (product.x, 1))  # [E, M, K]: each expert has M rows
    beyond = graph.call_function(operator.add, (graph.call_function(operator.mul, (each, codes.experts)), 1))
    ends = graph.call_function(aten.arange.start_step, (each, beyond, each), {"device": codes.device})
    flat = graph.call_function(aten.reshape.default, (product.x, [-1, codes.columns]))
    result = graph.call_function(ops.quantized_grouped_linear.default, (flat, *parts, ends, bits, rows))
    return graph.call_function(aten.reshape.default, (result, [codes.experts, each, rows]))


def exchange(old: fx.Node, new: fx.Node) -> None:
    """Put a node in the place of another."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
