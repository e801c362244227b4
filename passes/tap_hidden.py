"""TapHidden: the hidden states that the logits are computed from, as an output of the step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accelc.ir import Exactness, Program
from accelc.ir.errors import PassError
from accelc.passes.base import Pass, PassResult
from accelc.passes.output_projection import projected
from accelc.passes.registry import register_pass

HIDDEN = "hidden"


@register_pass
@dataclass(frozen=True)
class TapHidden(Pass):
    """A program whose last output ``hidden [B, N, H]`` is what its output projection reads.

    The place is found in the graph, backwards from the logits through what treats tokens alike; module names do not
    matter. Works on forward programs [B, T] and on steps.
    """

    name = "tap_hidden"
    after = ("derive_step", "recognise_masks")
    before = ("last_logits", "tree_attention")
    exactness = Exactness.EXACT
    expected_matches = (1, 1)

    def run(self, program: Program) -> PassResult:
        if HIDDEN in program.outputs:
            raise PassError(f"{program.name!r} has the output {HIDDEN!r} already", remedy="Run tap_hidden once.")
        program = program.clone()
        hidden = projected(program.output_node("logits"))
        if hidden is None:
            raise PassError(
                "the logits do not come out of a linear layer, so there are no hidden states before it",
                where=program.output_node("logits").name,
                remedy="Heads need a model that ends in a linear layer; other drafters do not.",
            )
        output = program.graph.output_node()
        output.args = ((*output.args[0], hidden),)
        program.module.recompile()
        return PassResult(replace(program, outputs=(*program.outputs, HIDDEN)), 1, (f"tapped at {hidden.name}",))
