"""What may share a kernel: the forms that templates have, and how two regions make one.

- A product of rows with weights: elements and norms before it are computed from whole rows by every program (a
  prologue); elements behind it, look-ups and writes of states are computed from the program's tile (an epilogue), and
  so are norms of a width that a tile has. Products of the same rows share a region, whatever follows them.
- Attention: elements before it that make queries, and elements behind it.
- Elements, norms and look-ups by themselves.
- A choice of the largest elements ends the region of the product that makes the scores.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass, field

import torch.fx as fx

from accelc.codegen.fusion.roles import Role
from accelc.codegen.fusion.values import Values

TILE = 256
"""Widest row that an epilogue may need as a whole: a head."""
KERNELS = {"attention": 2, "choice": 2}
"""Launches of a region, where not one: parts are joined by a second kernel."""


class Form(enum.Enum):
    """What a region's template is built around."""

    PRODUCT = "product"
    ATTENTION = "attention"
    ELEMENTS = "elements"
    CHOICE = "choice"
    OTHER = "other"


FORMS = {
    Role.PRODUCT: Form.PRODUCT,
    Role.ATTENTION: Form.ATTENTION,
    Role.ROWS: Form.ELEMENTS,
    Role.ELEMENTS: Form.ELEMENTS,
    Role.LOOKUP: Form.ELEMENTS,
    Role.WRITE: Form.ELEMENTS,
    Role.CHOICE: Form.CHOICE,
    Role.OTHER: Form.OTHER,
}


@dataclass(eq=False)
class Group:
    """Nodes that share a kernel, in the order of the program."""

    form: Form
    nodes: list[fx.Node]
    anchors: list[fx.Node] = field(default_factory=list)
    """The products, or the attention."""

    @classmethod
    def of(cls, node: fx.Node, role: Role) -> Group:
        """A node alone."""
        form = FORMS[role]
        return cls(form, [node], [node] if form in (Form.PRODUCT, Form.ATTENTION) else [])


class Rules:
    """Which groups of a program may become one."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def joined(self, first: Group, second: Group) -> Group | None:
        """The group of both, of which the second reads the first; None where no template computes that."""
        pair = (first.form, second.form)
        if pair == (Form.ELEMENTS, Form.ELEMENTS):
            form, fits = Form.ELEMENTS, True
        elif pair == (Form.ELEMENTS, Form.PRODUCT):
            form, fits = Form.PRODUCT, self._is_prologue(first, second)
        elif pair == (Form.ELEMENTS, Form.ATTENTION):
            form, fits = Form.ATTENTION, self._is_tiled(first.nodes) and not self._writes(first.nodes)
        elif pair in ((Form.PRODUCT, Form.ELEMENTS), (Form.ATTENTION, Form.ELEMENTS)):
            form, fits = first.form, self._is_tiled(second.nodes) and self._runs_forward(first, second)
        elif pair == (Form.ELEMENTS, Form.CHOICE):
            form, fits = Form.CHOICE, not second.anchors or self._is_prologue(first, second)
        elif pair == (Form.PRODUCT, Form.CHOICE):
            form, fits = Form.CHOICE, len(first.anchors) == 1 and not second.anchors
        elif pair == (Form.CHOICE, Form.ELEMENTS):
            form, fits = Form.CHOICE, self._is_tiled(second.nodes)
        else:
            return None
        return self._both(first, second, form) if fits else None

    def beside(self, first: Group, second: Group) -> Group | None:
        """The group of two products of the same rows that do not wait for each other; None for others."""
        if not first.form is second.form is Form.PRODUCT:
            return None
        kinds = {(anchor.target, self._layout(anchor)) for anchor in (*first.anchors, *second.anchors)}
        rows = {self._values.rows(anchor) for anchor in (*first.anchors, *second.anchors)}
        return self._both(first, second, Form.PRODUCT) if len(kinds) == len(rows) == 1 else None

    def _both(self, first: Group, second: Group, form: Form) -> Group:
        nodes = sorted([*first.nodes, *second.nodes], key=self._values.place.__getitem__)
        return Group(form, nodes, [*first.anchors, *second.anchors])

    @staticmethod
    def _layout(product: fx.Node) -> object:
        """What products must agree on to share a loop: the bits of codes."""
        return tuple(argument for argument in product.args[5:6] if isinstance(argument, int))

    def _is_prologue(self, first: Group, second: Group) -> bool:
        """Whether rows made by `first` enter products alone, or what reads them behind these needs no whole row."""
        made = set(first.nodes)
        entering = {self._values.rows(anchor) for anchor in second.anchors}
        if self._writes(first.nodes) and not entering & made:
            return False
        late = any(made & self._values.before[node] for node in self._behind(second))
        return not late or self._is_tiled(first.nodes)

    def _behind(self, group: Group) -> set[fx.Node]:
        """The nodes of a group that wait for its anchors."""
        found = set(group.anchors)
        for node in group.nodes:
            if self._values.before[node] & found:
                found.add(node)
        return found - set(group.anchors)

    def _runs_forward(self, first: Group, second: Group) -> bool:
        """Whether all of `second` can be computed behind the anchors: what reads them, or nothing of `first`."""
        behind = self._behind(first) | set(first.anchors)
        ahead = set(first.nodes) - behind
        wide = {node for node in ahead if self._values.work[node] is Role.ROWS}
        return not any(self._values.before[node] & wide for node in second.nodes)

    def _is_tiled(self, nodes: Collection[fx.Node]) -> bool:
        """Whether no node needs more of a row than a tile has."""
        return all(self._values.work[node] is not Role.ROWS or self._width(node) <= TILE for node in nodes)

    def _width(self, node: fx.Node) -> int:
        size = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        return size if isinstance(size, int) else TILE + 1

    def _writes(self, nodes: Collection[fx.Node]) -> bool:
        return any(self._values.work[node] is Role.WRITE for node in nodes)
