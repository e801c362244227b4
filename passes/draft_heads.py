"""DraftHeads: networks on hidden states, inserted behind the program that provides them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx

from accelc.ir import Exactness, Program
from accelc.ir.errors import PassError
from accelc.ir.program import fetch, store
from accelc.passes.base import Pass, PassResult
from accelc.passes.last_logits import choose_row
from accelc.passes.registry import register_pass
from accelc.passes.tap_hidden import HIDDEN

NAMES = "accelc_heads"
"""The inserted tensors stand below this name."""


@register_pass
@dataclass(frozen=True)
class DraftHeads(Pass):
    """From a program with the output ``hidden [B, N, H]`` to one that drafts from it.

    ``heads`` is a program from hidden [B, 1, H] and root [B, 1] to tokens of a tree [B, M] and what else it returns.
    New inputs are ``last [B]``, the row of the hidden states that each draft starts from, and ``root``; outputs are
    those of ``heads``. The heads are linear layers like all others: `quantize_weights` finds them.
    """

    name = "draft_heads"
    after = ("derive_step", "recognise_masks", "tap_hidden")
    before = ("quantize_weights",)
    exactness = Exactness.EXACT
    expected_matches = (1, None)

    heads: Program | None = field(default=None, repr=False)

    def options(self) -> dict[str, object]:
        return {"heads": "none" if self.heads is None else self.heads.name}

    def run(self, program: Program) -> PassResult:
        if self.heads is None or HIDDEN not in program.outputs:
            raise PassError(
                f"draft_heads needs heads, and a program with the output {HIDDEN!r}; {program.name!r} returns "
                f"{', '.join(program.outputs)}",
                remedy="Run tap_hidden before.",
            )
        program = program.clone()
        graph, hidden = program.graph, program.output_node(HIDDEN)
        end = next(n for n in program.placeholders() if n.target == program.inputs[-1])
        with graph.inserting_after(end):
            last = graph.placeholder("last")
        with graph.inserting_after(last):
            root = graph.placeholder("root")
        with graph.inserting_before(graph.output_node()):
            given = {HIDDEN: choose_row(graph, hidden, last, self.heads.device), "root": root}
            results = _inline(program, self.heads, given)
        graph.output_node().args = (results,)
        graph.eliminate_dead_code()
        program.module.recompile()
        linears = sum(node.target is torch.ops.aten.linear.default for node in self.heads.graph.nodes)
        made = replace(program, name="draft", inputs=(*program.inputs, "last", "root"), outputs=self.heads.outputs)
        return PassResult(made, linears)


def _inline(program: Program, heads: Program, given: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
    """Copy a program's nodes to where the graph is being written; its inputs are `given`. Returns its outputs."""
    known = {node: given[str(node.target)] for node in heads.placeholders()}
    for node in heads.graph.nodes:
        if node.op == "get_attr":
            path = f"{NAMES}.{node.target}"
            store(program.module, path, fetch(heads.module, str(node.target)))
            known[node] = program.graph.get_attr(path)
        elif node.op == "call_function":
            known[node] = program.graph.node_copy(node, known.__getitem__)
    return tuple(known[heads.output_node(name)] for name in heads.outputs)
