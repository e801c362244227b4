"""LastLogits: logits of one token a row, for prefills that need no others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from accelc.ir import Exactness, Program
from accelc.passes.base import Pass, PassResult
from accelc.passes.registry import register_pass

aten = torch.ops.aten

TOKENWISE = {
    aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.tanh.default, aten._to_copy.default,
    aten.to.dtype, aten.add.Tensor, aten.clone.default,
}  # fmt: skip
"""What may stand between the output projection and the logits."""
PROJECTIONS = {aten.linear.default, torch.ops.accelc.quantized_linear.default}


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
        target = hidden_states(logits)
        lengths = next(n for n in program.placeholders() if n.target == program.inputs[-1])
        with graph.inserting_after(lengths):
            last = graph.placeholder("last")
        user = next(iter(target.users))
        with graph.inserting_before(user):
            chosen = _choose(graph, target, last)
        if target is logits:
            graph.output_node().replace_input_with(logits, chosen)
        else:
            user.replace_input_with(target, chosen)
        graph.eliminate_dead_code()
        program.module.recompile()
        program = replace(program, name="prefill", inputs=(*program.inputs, "last"))
        return PassResult(program, 1, (f"chosen at {target.name}",))


def hidden_states(logits: fx.Node) -> fx.Node:
    """The input of the output projection when every operation from there to `logits` treats tokens alike, else
    `logits`.
    """
    node = logits
    while len(node.users) == 1 and node.op == "call_function":
        if node.target in PROJECTIONS:
            hidden = node.args[0]
            return hidden if isinstance(hidden, fx.Node) and len(hidden.users) == 1 else logits
        tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if node.target not in TOKENWISE or len(tensors) != 1:
            return logits
        node = tensors[0]
    return logits


def _choose(graph: fx.Graph, value: fx.Node, last: fx.Node) -> fx.Node:
    """value [B, N, C] at row last[b]: [B, 1, C]."""
    batch = graph.call_function(aten.sym_size.int, (last, 0))
    rows = graph.call_function(aten.arange.default, (batch,))
    chosen = graph.call_function(aten.index.Tensor, (value, [rows, last]))
    return graph.call_function(aten.unsqueeze.default, (chosen, 1))
