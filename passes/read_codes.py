"""Products with a dequantized weight read its codes: what modules dequantize is not written out as floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.passes.base import Pass, PassResult
from accelc.passes.quantize.products import Product, lies_turned, product_of, readers
from accelc.passes.quantize.rewrite import Codes, exchange, quantized_product
from accelc.passes.registry import register_pass

ops = torch.ops.accelc


@register_pass
@dataclass(frozen=True)
class ReadCodes(Pass):
    """`accelc::dequantize` of a weight, then a product with it, becomes `accelc::quantized_linear`, or
    `accelc::quantized_grouped_linear` for stacks of experts, in any spelling of the product.

    What else reads the floats keeps doing so. Matches are products. Exact up to rounding.
    """

    name = "read_codes"
    after = ("normalise",)
    expected_matches = (0, None)

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        count = 0
        for node in list(program.graph.nodes):
            for product in _products(node) if node.target is ops.dequantize.default else ():
                _read(node, product)
                count += 1
        program.graph.eliminate_dead_code()
        program.module.recompile()
        return PassResult(program.clone(), count)


def _products(weight: fx.Node) -> list[Product]:
    """The products with a weight [..., N, K] that is multiplied as it lies."""
    found = []
    for reader, turned, view in list(readers(weight)):
        product = product_of(reader, view)
        if product is not None and not lies_turned(reader, turned):
            found.append(product)
    return found


def _read(weight: fx.Node, product: Product) -> None:
    """Let a product read the codes of a dequantized weight."""
    *parts, bits, rows, columns, _ = weight.args
    value = weight.meta["val"]
    codes = Codes(tuple(parts), int(bits), int(rows), int(columns), value.shape[0], value.device)  # type: ignore[arg-type]
    with weight.graph.inserting_before(product.node):
        new = quantized_product(weight.graph, product, codes)
    exchange(product.node, new)
