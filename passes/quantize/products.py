"""Products with a weight, in any spelling that a captured program has: which tensor is the weight, how it lies, and
what else reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Program
from accelc.ir.operators import GROUPED, schema_name
from accelc.ir.program import fetch

aten = torch.ops.aten

Kind = Literal["linear", "batched", "grouped"]
"""``linear``: one matrix for all rows; ``batched``: one for each element of a batch; ``grouped``: rows sorted by
expert."""

CHOICES = {aten.topk.default, aten.sort.default, aten.argsort.default, aten.argmax.default, aten.max.dim}
ATTENTION = {torch.ops.accelc.attention.default, torch.ops.accelc.full_attention.default}


@dataclass(frozen=True)
class Product:
    """A node that multiplies rows ``x`` [..., K] by a weight: y = x W^T (+ bias [N]).

    Operands are given by their places among the node's arguments: what is there changes when other nodes are replaced.
    """

    node: fx.Node
    kind: Kind
    x_place: int = 0
    bias_place: int | None = None
    ends_place: int | None = None

    @property
    def x(self) -> fx.Node:
        """The rows."""
        return self.node.args[self.x_place]  # type: ignore[return-value]

    @property
    def bias(self) -> fx.Node | None:
        """What is added to each row of the result, if anything is."""
        return None if self.bias_place is None else self.node.args[self.bias_place]  # type: ignore[return-value]

    @property
    def ends(self) -> fx.Node | None:
        """Where the rows of each expert end, if they are sorted by expert."""
        return None if self.ends_place is None else self.node.args[self.ends_place]  # type: ignore[return-value]


@dataclass
class Matrix:
    """A weight that only products and look-ups read.

    ``turned``: it is stored [..., K, N], else [..., N, K]. ``lookups``: embeddings that read its rows. ``router``: a
    choice (top-k) depends on its products, which an error of rounding can turn.
    """

    path: str
    turned: bool
    products: list[Product] = field(default_factory=list)
    lookups: list[fx.Node] = field(default_factory=list)
    router: bool = False

    def weight(self, program: Program) -> Tensor:
        """Its values as [..., N, K]."""
        value = fetch(program.module, self.path).detach()
        return value.transpose(-1, -2) if self.turned else value


def find_matrices(program: Program) -> dict[str, Matrix]:
    """Every weight of a program by name, with what reads it; tables that are only looked up count as well.

    A weight is left out when something else reads it too, or when it lies in two ways.
    """
    return scan(program)[0]


def scan(program: Program) -> tuple[dict[str, Matrix], list[str]]:
    """`find_matrices`, and the names of weights of products that are left out."""
    found: dict[str, list[tuple[bool, Product]]] = defaultdict(list)
    lookups: dict[str, list[fx.Node]] = defaultdict(list)
    refused: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "get_attr" or not _is_matrix(fetch(program.module, str(node.target))):
            continue
        path = str(node.target)
        for reader, turned, view in readers(node):
            if reader.target is aten.embedding.default and reader.args[0] is view and not turned:
                lookups[path].append(reader)
            elif product := product_of(reader, view):
                found[path].append((lies_turned(reader, turned), product))
            else:
                refused.add(path)
    matrices, left = {}, []
    for path in {**found, **lookups}:
        ways = {turned for turned, _ in found[path]}
        if path in refused or len(ways) > 1 or (lookups[path] and True in ways):
            left += [path] if found[path] else []
            continue
        products = [product for _, product in found[path]]
        router = any(_chooses(product.node) for product in products)
        matrices[path] = Matrix(path, True in ways, products, lookups[path], router)
    return matrices, left


def head_of(program: Program, matrices: Mapping[str, Matrix]) -> str | None:
    """The name of the weight that makes the logits, through whatever treats these element by element."""
    owner = {product.node: path for path, matrix in matrices.items() for product in matrix.products}
    node = program.output_node("logits") if "logits" in program.outputs else None
    while node is not None and node not in owner:
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        node = inputs[0] if len(inputs) == 1 else None
    return owner.get(node) if node is not None else None


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() in (2, 3) and value.is_floating_point()


def readers(node: fx.Node, turned: bool = False) -> Iterator[tuple[fx.Node, bool, fx.Node]]:
    """What reads a weight, directly or with its last two dims exchanged, whether they are, and the node it reads."""
    for user in node.users:
        if _exchanges(user, node):
            yield from readers(user, not turned)
        else:
            yield user, turned, node


def lies_turned(reader: fx.Node, turned: bool) -> bool:
    """Whether a weight is stored [..., K, N], by the product that reads it, its last two dims exchanged or not."""
    return turned != (reader.target is not aten.linear.default)


def _exchanges(node: fx.Node, source: fx.Node) -> bool:
    """Whether the node exchanges the last two dims of its argument, and does nothing else."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    value = source.meta.get("val")
    rank = value.dim() if isinstance(value, Tensor) else None
    if node.target is aten.transpose.int:
        a, b = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
        return {a, b} == {-1, -2} or (rank is not None and {a % rank, b % rank} == {rank - 1, rank - 2})
    if node.target is aten.permute.default:
        order = list(node.args[1])  # type: ignore[arg-type]
        n = len(order)
        return [d % n for d in order] == [*range(n - 2), n - 1, n - 2]
    return False


def product_of(node: fx.Node, weight: fx.Node) -> Product | None:
    """The node as a product with `weight`, which is used for nothing else in it."""
    if sum(argument is weight for argument in node.args) != 1 or not isinstance(node.target, torch._ops.OpOverload):
        return None
    args, target = node.args, node.target
    rank = len(weight.meta["val"].shape) if "val" in weight.meta else _rank(weight)
    if target is aten.linear.default and args[1] is weight and rank == 2:
        return Product(node, "linear", bias_place=2 if len(args) > 2 else None)
    if target is aten.addmm.default and args[2] is weight and not node.kwargs:
        bias = args[0].meta.get("val") if isinstance(args[0], fx.Node) else None  # type: ignore[union-attr]
        flat = bias.dim() == 1 if isinstance(bias, Tensor) else _rank(args[0]) == 1  # type: ignore[arg-type]
        return Product(node, "linear", x_place=1, bias_place=0) if flat else None
    if target in (aten.mm.default, aten.matmul.default) and args[1] is weight and rank == 2:
        return Product(node, "linear")
    if target is aten.bmm.default and args[1] is weight:
        return Product(node, "batched")
    named = schema_name(target) in GROUPED
    if named and rank == 3 and args[1] is weight and len(args) == 3 and not any(node.kwargs.values()):
        return Product(node, "grouped", ends_place=2)
    return None


def _rank(node: fx.Node) -> int | None:
    """The rank of an attribute, read from its owner."""
    while node.op == "call_function":
        node = node.all_input_nodes[0]
    module = node.graph.owning_module
    return fetch(module, str(node.target)).dim() if node.op == "get_attr" and module is not None else None


def _chooses(node: fx.Node) -> bool:
    """Whether a choice depends on a product by nothing but operations on its own elements: then it is a router's."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user.target in CHOICES:
                return True
            ends = user.target in ATTENTION or user.target is aten.linear.default or user.op == "output"
            if user not in seen and not ends and _elementwise(user):
                seen.add(user)
                stack.append(user)
    return False


def _elementwise(node: fx.Node) -> bool:
    if node.target in (aten.softmax.int, aten._softmax.default):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags
        or node.target in (aten._to_copy.default, aten.to.dtype, aten.reshape.default, aten.view.default)
    )
