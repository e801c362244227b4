"""Activation-aware scales folded into norms: the graph computes the same function, with weights that round better."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Program
from accelc.ir.program import fetch, store
from accelc.ir.quantized import Scheme
from accelc.passes.quantize.activation_aware import search_scales
from accelc.passes.quantize.calibration import Calibration, Rows, run_calibrated
from accelc.passes.quantize.memory import free
from accelc.passes.quantize.products import Matrix, Product

aten = torch.ops.aten
ops = torch.ops.accelc

PASSED_ON = {
    aten.reshape.default, aten.view.default, aten.expand.default, aten.clone.default, aten._to_copy.default,
    aten.to.dtype, aten.unsqueeze.default, aten.contiguous.default,
}  # fmt: skip
"""What may stand between a norm and the products that read it; the last dim stays as it is."""


@dataclass(frozen=True)
class Scaled:
    """A norm of which every reader is a product: its weights can take over a factor of each column."""

    norm: fx.Node
    products: tuple[tuple[Matrix, Product], ...]


def scale_norms(
    program: Program,
    matrices: Mapping[str, Matrix],
    schemes: Mapping[str, Scheme],
    text: Calibration,
    consumed: Collection[str] = (),
) -> str:
    """Scale the weights behind each norm, and the norm's own: new tensors, the old ones stay as they are, but for
    weights `consumed`, by path, whose memory is given back.

    Returns a note on what that gained. Weights that read anything but such a norm are left as they are.
    """
    groups = list(find_groups(program, matrices))
    owner = {product.node: group for group in groups for _, product in group.products}
    scales: dict[fx.Node, Tensor] = {}
    gains = []

    def collect(matrix: Matrix, product: Product, pieces: Sequence[Rows]) -> None:
        group = owner.get(product.node)
        if group is None or group.norm in scales:
            return
        weights = [m.weight(program) for m, _ in group.products]
        kept = [schemes[m.path] for m, _ in group.products]
        found, before, after = search_scales([piece.x for piece in pieces], weights, kept)
        scales[group.norm] = found
        gains.append(after / before if before > 0 else 1.0)

    run_calibrated(program, matrices, text, collect)
    for group in groups:
        if group.norm in scales:
            _fold(program, group, scales[group.norm], consumed)
    if not gains:
        return "no norm is read by quantized weights alone: nothing scaled"
    return f"{len(gains)} norms scaled, their products' squared error is {sum(gains) / len(gains):.2f} of what it was"


def find_groups(program: Program, matrices: Mapping[str, Matrix]) -> Iterator[Scaled]:
    """Norms with a weight of their own whose every reader is one of the products."""
    owners = {p.node: (m, p) for m in matrices.values() if not m.turned or len(m.products) == 1 for p in m.products}
    readers: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    for node in program.graph.nodes:
        parts = _parameters(node)
        if not parts or any(readers[str(p.target)] != 1 for p in parts):
            continue
        products = _products_of(node, owners)
        alone = products and all(m.products == [p] and not m.lookups and p.kind == "linear" for m, p in products)
        if products and alone:
            yield Scaled(node, tuple(products))


def _parameters(norm: fx.Node) -> list[fx.Node]:
    """The weight, and bias, of a norm over its last dim; none for other nodes, or where they are not attributes."""
    if norm.target is ops.rms_norm.default:
        parts = [norm.args[1]]
    elif norm.target is aten.layer_norm.default and len(norm.args) > 3 and len(norm.args[1]) == 1:  # type: ignore[arg-type]
        parts = [p for p in norm.args[2:4] if p is not None]
        parts = parts if norm.args[2] is not None else []
    else:
        return []
    good = all(isinstance(p, fx.Node) and p.op == "get_attr" for p in parts)
    return parts if good else []  # type: ignore[return-value]


def _products_of(
    node: fx.Node, owners: Mapping[fx.Node, tuple[Matrix, Product]]
) -> list[tuple[Matrix, Product]] | None:
    """The products that read a value; None when anything else does."""
    found: list[tuple[Matrix, Product]] = []
    for user in node.users:
        if user in owners and owners[user][1].x is node:
            found.append(owners[user])
        elif user.target in PASSED_ON and _keeps_last(user, node):
            inner = _products_of(user, owners)
            if inner is None:
                return None
            found += inner
        else:
            return None
    return found


def _keeps_last(view: fx.Node, source: fx.Node) -> bool:
    """Whether a view leaves the last dim alone; a size that is not written out (-1) is taken for another."""
    if view.target not in (aten.reshape.default, aten.view.default):
        return True
    sizes = view.args[1]
    norm = source
    while norm.target in PASSED_ON:
        norm = norm.args[0]  # type: ignore[assignment]
    weight = _parameters(norm)[0]
    module = weight.graph.owning_module
    assert module is not None
    return bool(sizes) and sizes[-1] == fetch(module, str(weight.target)).shape[-1]  # type: ignore[index]


def _fold(program: Program, group: Scaled, scales: Tensor, consumed: Collection[str]) -> None:
    parts = _parameters(group.norm)
    offset = float(group.norm.args[3]) if group.norm.target is ops.rms_norm.default else 0.0  # type: ignore[arg-type]
    for index, part in enumerate(parts):
        own = fetch(program.module, str(part.target))
        shift = offset if index == 0 else 0.0
        store(program.module, str(part.target), ((own.float() + shift) / scales - shift).to(own.dtype))
    for matrix, _ in group.products:
        own = fetch(program.module, matrix.path)
        factor = scales[:, None] if matrix.turned else scales
        store(program.module, matrix.path, (own.float() * factor).to(own.dtype))
        if matrix.path in consumed:
            free(own)
