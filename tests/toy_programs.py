"""Small programs for tests of the framework: written node by node, so that nothing is hidden by capture."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from accelc.ir import Program, StateSpec
from accelc.ir.compat import fill_values
from accelc.ir.program import store

aten = torch.ops.aten


def add_values(program: Program, *examples: Tensor) -> Program:
    """Give every node its fake value, from example inputs; in place, returns the program."""
    with FakeTensorMode() as mode:
        for node, example in zip(program.placeholders(), examples, strict=True):
            node.meta["val"] = mode.from_tensor(example)
    fill_values(program.graph, program.module)
    return program


def affine() -> Program:
    """x [B, 4] -> y = x @ weight + 1."""
    root, graph = torch.nn.Module(), fx.Graph()
    store(root, "layer.weight", torch.randn(4, 4))
    x = graph.placeholder("x")
    product = graph.call_function(aten.mm.default, (x, graph.get_attr("layer.weight")))
    graph.output((graph.call_function(aten.add.Tensor, (product, 1)),))
    return add_values(Program("affine", fx.GraphModule(root, graph), ("x",), ("y",)), torch.zeros(3, 4))


def counter() -> Program:
    """A step program: writes the new rows [B, N, 2] into its cache [B, S, 2] and returns the sum over all slots."""
    graph = fx.Graph()
    rows, lengths, cache = (graph.placeholder(n) for n in ("rows", "lengths", "cache"))
    graph.call_function(torch.ops.accelc.cache_update.default, (cache, rows, lengths, 1))
    graph.output((graph.call_function(aten.sum.dim_IntList, (cache, [1])),))
    state = StateSpec("cache", ("B", "S", 2), torch.float32, time_dim=1)
    program = Program("counter", fx.GraphModule(torch.nn.Module(), graph), ("rows", "lengths"), ("total",), (state,))
    return add_values(program, torch.zeros(2, 3, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 8, 2))


def node_of(program: Program, target: object) -> fx.Node:
    """The only call of `target`."""
    (node,) = program.graph.find_nodes(op="call_function", target=target)
    return node
