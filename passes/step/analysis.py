"""What the derivation knows of the forward graph: sizes of dims, and what each node depends on."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.ir.errors import DeriveError, around
from accelc.passes.step.sizes import Size, Symbols, shape_of
from accelc.passes.step.wants import Dim, Roles, Want

aten = torch.ops.aten

REFUSED = {
    aten.item: "reads a value on the host",
    aten._local_scalar_dense: "reads a value on the host",
    aten.nonzero: "makes a shape that depends on data",
    aten.roll: "shifts along a dim",
    aten.conv1d: "is a convolution, which may shift along the sequence",
    aten.convolution: "is a convolution, which may shift along the sequence",
}
"""Operations with a reason of their own for not being derived."""


class Analysis:
    """Facts about a forward program: ``size`` of every dim, dependence on tokens, roles by shape."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.inputs = program.placeholders()
        self.symbols = Symbols.of(self.inputs[0], int(program.facts["capture"]["max_length"]))  # type: ignore[index]
        self._sizes: dict[fx.Node, tuple[Size, ...]] = {}
        self.token_dependent: set[fx.Node] = set()
        self.size_dependent: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in self.inputs or self.token_dependent.intersection(_data_inputs(node)):
                self.token_dependent.add(node)
            if is_size(node) or _fills_by_shape(node) or self.size_dependent.intersection(node.all_input_nodes):
                self.size_dependent.add(node)

    def sizes(self, node: fx.Node) -> tuple[Size, ...]:
        """The size of every dim; refuses sizes that are no polynomial in batch and length."""
        if node not in self._sizes:
            found = [self.symbols.size(s) for s in shape_of(node)]
            if any(s is None for s in found):
                raise DeriveError(
                    f"{node.name} has a size that depends on data or is no polynomial in batch and length: "
                    f"{list(shape_of(node))}",
                    where="\n" + around(self.graph, node),
                )
            self._sizes[node] = tuple(s for s in found if s is not None)
        return self._sizes[node]

    def is_index(self, node: fx.Node) -> bool:
        """Whether the value belongs to the index domain: it follows from batch and length, not from the tokens."""
        return node not in self.token_dependent and node in self.size_dependent

    def is_static(self, node: fx.Node) -> bool:
        """Whether the value depends on neither tokens nor sizes: parameters and what is computed from them alone."""
        return node not in self.token_dependent and node not in self.size_dependent

    def has_time(self, node: fx.Node) -> bool:
        """Whether any dim of the value runs along the sequence."""
        return any(s.has_time for s in self.sizes(node))

    def batch_dim(self, node: fx.Node) -> int | None:
        """The dim that is the batch (alone or merged with others), or None."""
        dims = [d for d, s in enumerate(self.sizes(node)) if s.batch or s.rows]
        return dims[0] if dims else None

    def roles(self, node: fx.Node, role: str) -> Roles:
        """Roles with every sequence dim in `role`."""
        return tuple(role if s.has_time else None for s in self.sizes(node))

    def want(self, node: fx.Node, role: str) -> Want:
        """`node` with every sequence dim in `role`."""
        return Want(node, self.roles(node, role))

    def dims(self, node: fx.Node, roles: Roles) -> list[Dim]:
        """The size arguments that give `node`'s shape in `roles`."""
        return [Dim(s, r) for s, r in zip(self.sizes(node), roles, strict=True)]

    def refuse(self, node: fx.Node, reason: str, remedy: str = "") -> DeriveError:
        """The error that names a node, its surroundings and the reason."""
        what = f"{node.name} ({_target(node)}) {reason}"
        return DeriveError(what, where="\n" + around(self.graph, node), remedy=remedy)

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Index of every node in graph order."""
        return {n: i for i, n in enumerate(self.graph.nodes)}


def _data_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values (not only sizes) matter to the node."""
    if node.target in SIZE_ONLY or is_size(node):
        return []
    return node.all_input_nodes


def _fills_by_shape(node: fx.Node) -> bool:
    """Whether a tensor of a constant takes its sizes, batch or length among them, from another tensor."""
    return node.target in SIZE_ONLY and any(isinstance(size, torch.SymInt) for size in shape_of(node))


SIZE_ONLY = {
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.new_full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.sym_size.int,
}
"""Operations that look at their input's shape, never at its values."""


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a symbolic number."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _target(node: fx.Node) -> str:
    return str(node.target)
