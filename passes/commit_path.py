"""CommitPath: the program that keeps the accepted path of a tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from accelc.ir import Exactness, Program, StateSpec
from accelc.ir.program import graph_module
from accelc.passes.base import Pass, PassResult
from accelc.passes.registry import register_pass

aten, accelc = torch.ops.aten, torch.ops.accelc

INPUTS = ("path", "counts", "lengths")


@register_pass
@dataclass(frozen=True)
class CommitPath(Pass):
    """From a step to the program that moves the state rows of an accepted path to where a chain would have put them.

    path [B, N] int64: new token path[b, i] of the step becomes the one at slot lengths[b] + i; beyond the path
    path[b, i] = i, which moves nothing. counts [B] int64: tokens of each path. Returns lengths + counts.
    """

    name = "commit_path"
    after = ("derive_step",)
    exactness = Exactness.EXACT
    expected_matches = (0, None)

    def run(self, program: Program) -> PassResult:
        graph = fx.Graph()
        path, counts, lengths = (graph.placeholder(name) for name in INPUTS)
        states = [graph.placeholder(spec.name) for spec in program.states]
        column = graph.call_function(aten.unsqueeze.default, (lengths, 1))
        slots = graph.call_function(aten.add.Tensor, (path, column))  # [B, N]
        for spec, state in zip(program.states, states, strict=True):
            rows = _rows(graph, state, spec, slots)
            graph.call_function(accelc.cache_update.default, (state, rows, lengths, spec.time_dim))
        graph.output((graph.call_function(aten.add.Tensor, (lengths, counts)),))
        module = graph_module(torch.nn.Module(), graph)
        commit = Program("commit", module, INPUTS, ("lengths",), program.states, facts=dict(program.facts))
        return PassResult(commit, len(states))


def _rows(graph: fx.Graph, state: fx.Node, spec: StateSpec, slots: fx.Node) -> fx.Node:
    """The rows of a state [B, ..., S, ...] at slots [B, N], copied: [B, ..., N, ...]."""
    index = slots
    for dim in range(1, len(spec.shape)):
        if dim != spec.time_dim:
            index = graph.call_function(aten.unsqueeze.default, (index, dim))
    sizes = [-1 if isinstance(size, str) else size for size in spec.shape]
    index = graph.call_function(aten.expand.default, (index, sizes))
    return graph.call_function(aten.gather.default, (state, spec.time_dim, index))
