"""Raise gated activations: activation(gate) * up becomes `accelc::gated_activation`; spelled-out ones are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.passes.base import Pass, PassResult
from accelc.passes.match import Builder, argument, aten, before_casts, is_call, same, shape, tensor
from accelc.passes.polynomial import Polynomial, arithmetic_inputs, arithmetic_users, close, polynomial
from accelc.passes.registry import register_pass

KINDS = {aten.silu: "silu", aten.relu: "relu", aten.sigmoid: "sigmoid"}


@dataclass(frozen=True)
class Spelling:
    """An activation spelled as a polynomial in x and one function of a polynomial in x; keys are (power of x, of f)."""

    name: str
    function: object
    inside: Polynomial
    outside: Polynomial
    target: torch._ops.OpOverload
    options: Mapping[str, object] = field(default_factory=dict)


_TANH = 0.7978845608028654  # sqrt(2 / pi)
SPELLINGS = (
    Spelling(
        "gelu_tanh",
        aten.tanh,
        {(1, 0): _TANH, (3, 0): _TANH * 0.044715},
        {(1, 0): 0.5, (1, 1): 0.5},
        aten.gelu.default,
        {"approximate": "tanh"},
    ),
    Spelling("gelu", aten.erf, {(1, 0): 0.5**0.5}, {(1, 0): 0.5, (1, 1): 0.5}, aten.gelu.default),
    Spelling("silu", aten.sigmoid, {(1, 0): 1.0}, {(1, 1): 1.0}, aten.silu.default),
)


@register_pass
@dataclass(frozen=True)
class RaiseGatedActivation(Pass):
    """activation(gate) * up, both of one shape, becomes one `accelc::gated_activation`.

    * the activations of the dialect, silu, gelu, gelu_tanh, relu and sigmoid, with conversions of dtype around them;
    * activations spelled out by arithmetic are named first, whether a gate follows or not: gelu by erf, gelu by tanh
      (in any arrangement of its polynomial), silu as x * sigmoid(x).

    A factor that broadcasts (the gate of a whole expert or head) is no gated activation, nor is an activation times its
    own argument (x * sigmoid(1.702 * x)). Matches are gates raised and activations named; the notes tell how many of
    each. Exact up to rounding: a 16-bit model rounds between the operations that become one.
    """

    name = "raise_gated_activation"
    after = ("normalise",)
    before = ("derive_step",)
    requires = ("normalised",)
    expected_matches = (0, None)

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        builder = Builder()
        named: dict[str, int] = {}
        for node in list(program.graph.nodes):
            for spelling in SPELLINGS:
                if is_call(node, spelling.function) and _name(builder, node, spelling):
                    named[spelling.name] = named.get(spelling.name, 0) + 1
        gates = sum(_raise_gate(builder, node) for node in list(program.graph.nodes))
        program.graph.eliminate_dead_code()
        program.module.recompile()
        notes = [f"{count} {name} spelled out" for name, count in named.items()]
        if gates:
            notes.append(f"{gates} gates")
        return PassResult(program, gates + sum(named.values()), tuple(notes))


# -- spelled-out activations -----------------------------------------------------------------------------------------


def _name(builder: Builder, node: fx.Node, spelling: Spelling) -> bool:
    """Replace the activation that `node`, the function in its middle, belongs to; whether there was one."""
    for x in arithmetic_inputs(node.args[0]):
        if not close(polynomial(node.args[0], {x: (1, 0)}), spelling.inside):
            continue
        for result in arithmetic_users(node):
            if close(polynomial(result, {x: (1, 0), node: (0, 1)}), spelling.outside):
                activation = builder.emit(result, spelling.target, x, **spelling.options)
                result.replace_all_uses_with(builder.cast(result, activation, result.meta["val"].dtype))
                return True
    return False


# -- gates -----------------------------------------------------------------------------------------------------------


def _raise_gate(builder: Builder, node: fx.Node) -> bool:
    """Replace `node` when it is activation(gate) * up; whether it was."""
    if not is_call(node, aten.mul):
        return False
    for activation, up in (node.args[:2], node.args[1::-1]):
        found = _activation(before_casts(activation))
        if found is None or tensor(up) is None or up is activation:
            continue
        gate, kind = found
        if before_casts(up) in arithmetic_inputs(gate) or not same(shape(up), shape(gate)):  # type: ignore[arg-type]
            continue
        if not up.meta["val"].is_floating_point():  # type: ignore[union-attr]
            continue
        new = builder.emit(node, torch.ops.accelc.gated_activation.default, gate, up, kind)
        node.replace_all_uses_with(builder.cast(node, new, node.meta["val"].dtype))
        return True
    return False


def _activation(node: Any) -> tuple[fx.Node, str] | None:
    """(x, kind) when `node` is one of the dialect's activations of x."""
    if is_call(node, aten.gelu):
        return node.args[0], "gelu_tanh" if argument(node, "approximate") == "tanh" else "gelu"  # type: ignore[return-value]
    if is_call(node, *KINDS):
        return node.args[0], KINDS[node.target.overloadpacket]  # type: ignore[return-value,union-attr]
    return None
