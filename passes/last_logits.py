"""LastLogits: logits of one token a row, for prefills that need no others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from accelc.ir import Exactness, Program
from accelc.passes.base import Pass, PassResult
from accelc.passes.output_projection import projected, readers
from accelc.passes.registry import register_pass

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True)
class LastLogits(Pass):
    """A step whose logits [B, 1, V] are those of token last[b] alone, ``last [B]`` int64 being a new input after
    lengths.

    The choice is moved before the output projection, whose cost is then that of one token; the states are updated as
    before.
    """

    name = "last_logits"
    after = ("derive_step", "recognise_masks")
    exactness = Exactness.EXACT
    expected_matches = (1, 1)

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        graph = program.graph
        logits = program.output_node("logits")
        hidden = projected(logits)
        # Where something else reads the hidden states, the logits are chosen.
        target = hidden if hidden is not None and len(readers(hidden)) == 1 else logits
        lengths = next(n for n in program.placeholders() if n.target == program.inputs[-1])
        with graph.inserting_after(lengths):
            last = graph.placeholder("last")
        if target is logits:
            with graph.inserting_before(graph.output_node()):
                chosen = choose_row(graph, target, last, program.device)
            returned = list(graph.output_node().args[0])  # type: ignore[arg-type]
            returned[program.outputs.index("logits")] = chosen
            graph.output_node().args = (tuple(returned),)
        else:
            (user,) = readers(target)
            with graph.inserting_before(user):
                user.replace_input_with(target, choose_row(graph, target, last, program.device))
        graph.eliminate_dead_code()
        program.module.recompile()
        program = replace(program, name="prefill", inputs=(*program.inputs, "last"))
        return PassResult(program, 1, (f"chosen at {target.name}",))


def choose_row(graph: fx.Graph, value: fx.Node, last: fx.Node, device: torch.device) -> fx.Node:
    """value [B, N, C], on a device, at row last[b]: [B, 1, C]."""
    batch = graph.call_function(aten.sym_size.int, (last, 0))
    rows = graph.call_function(aten.arange.default, (batch,), {"device": device})
    chosen = graph.call_function(aten.index.Tensor, (value, [rows, last]))
    return graph.call_function(aten.unsqueeze.default, (chosen, 1))
