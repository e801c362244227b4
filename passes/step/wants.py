"""The vocabulary of the derivation: which version of a value is wanted, and what computes it.

A value of the forward program has dims that run along the sequence. In the step each such dim plays a *role*: ``Q``,
the N new tokens, or ``K``, all S cache slots. A `Want` is a value in given roles; a rule turns it into a `Call` over
the wants of its inputs, in which every size has been replaced by one that follows from the roles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from accelc.passes.step.sizes import Size

Q, K = "Q", "K"
Roles = tuple[str | None, ...]
"""One role per dim; None for dims that do not run along the sequence."""


@dataclass(frozen=True)
class Want:
    """The value of a forward node with its sequence dims in the given roles."""

    node: fx.Node
    roles: Roles

    @property
    def is_key(self) -> bool:
        """Whether the value is wanted for all slots and not at all for the new tokens."""
        return K in self.roles and Q not in self.roles

    def __str__(self) -> str:
        return f"{self.node.name}[{', '.join(r or '-' for r in self.roles)}]"


@dataclass(frozen=True)
class Masked:
    """A want whose hidden (query, slot) pairs are filled before a reduction over the slots."""

    want: Want
    fill: float


@dataclass(frozen=True)
class Dim:
    """A size argument: polynomial ``size`` with T read as N or S according to ``role``."""

    size: Size
    role: str | None


@dataclass(frozen=True)
class Input:
    """One of the step's own inputs: positions, lengths, or the slot count."""

    name: str


@dataclass
class Call:
    """How to compute a want. ``args`` and ``kwargs`` are those of ``target`` with Want, Masked, Dim and Input inside.

    ``broadcast`` names arguments that follow broadcasting rules, so that per-row lookups can be lined up with the
    batch dim; ``emit`` replaces the plain call for the few values that need more than one operation.
    """

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    broadcast: bool = False
    prefix_sizes: int | None = None
    """Position of a size list that a lifted value needs extended by the batch in front."""
    zero_hidden: bool = False
    """Whether the result is exactly zero wherever a slot is hidden from a query."""
    emit: Callable[..., fx.Node] | None = None

    def wants(self) -> Iterator[Want]:
        """All wants among the arguments."""
        yield from _wants(self.args)
        yield from _wants(self.kwargs)


def _wants(value: Any) -> Iterator[Want]:
    if isinstance(value, Want):
        yield value
    elif isinstance(value, Masked):
        yield value.want
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _wants(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _wants(item)
