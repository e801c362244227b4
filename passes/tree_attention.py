"""TreeAttention: the step for tokens that are a tree instead of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from accelc.ir import Exactness, Program
from accelc.ir.errors import PassError
from accelc.passes.base import Pass, PassResult
from accelc.passes.registry import register_pass


@register_pass
@dataclass(frozen=True)
class TreeAttention(Pass):
    """A step whose new tokens see their ancestors alone; ``tree [B, N, W]`` int64 is a new input after lengths.

    Bit j of the words of token i says that token j is an ancestor of i or i itself; a token stands at the position of
    its depth. Contents are data, so one program serves any tree, another one for each row, chains included. Every
    operation that says what a new token may see takes the words: those of the dialect with an argument ``tree``.
    """

    name = "tree_attention"
    after = ("derive_step", "recognise_masks")
    exactness = Exactness.EXACT
    expected_matches = (0, None)  # a model may mix no tokens at all

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        if "lengths" not in program.inputs or "tree" in program.inputs:
            raise PassError(
                f"{self.name} takes a step of a chain, and {program.name!r} has the inputs {', '.join(program.inputs)}",
                remedy="Run it once, after derive_step.",
            )
        lengths = next(n for n in program.placeholders() if n.target == "lengths")
        with program.graph.inserting_after(lengths):
            tree = program.graph.placeholder("tree")
        matches = 0
        for node in program.graph.nodes:
            if (place := place_of_tree(node)) is not None:
                node.update_arg(place, tree)
                matches += 1
        program.module.recompile()
        at = program.inputs.index("lengths") + 1
        inputs: Sequence[str] = (*program.inputs[:at], "tree", *program.inputs[at:])
        return PassResult(replace(program, name="verify", inputs=tuple(inputs)), matches)


def place_of_tree(node: fx.Node) -> int | None:
    """Which argument of a dialect operation is its tree; None for all others."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "accelc":
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    return names.index("tree") if "tree" in names else None
