"""Program: an fx graph over aten and the accelc dialect, with named inputs, outputs and states, and its history."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx

from accelc.ir.compat import lazy_graph_module
from accelc.ir.errors import InvariantError, around, describe
from accelc.ir.exactness import Exactness
from accelc.ir.state import StateSpec


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: name and options, how often it matched, seconds taken, and free-form notes for the report."""

    name: str
    options: dict[str, object]
    matches: int
    seconds: float
    exactness: Exactness
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        head = f"{self.name}({options}): {self.matches} matches, {self.seconds * 1e3:.0f} ms, {self.exactness}"
        return "\n".join([head, *(f"    {note}" for note in self.notes)])


@dataclass
class Program:
    """A graph module together with what its inputs, outputs and states mean.

    * ``module``: placeholders are ``inputs`` followed by one per state, in order; parameters, buffers and tables are
      ``get_attr`` nodes; the single output node returns a tuple, one entry per name in ``outputs``.
    * a *forward* program maps ``tokens [B, T]`` to ``logits [B, T, V]`` and has no states; a *step* program takes
      ``tokens [B, N], positions [B, N], lengths [B]`` and its states, which it mutates through `accelc::cache_update`.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[StateSpec, ...] = ()
    exactness: Exactness = Exactness.EXACT
    history: tuple[PassRecord, ...] = ()
    facts: dict[str, object] = field(default_factory=dict)
    """Results of analyses that later passes and the report read, by the name of the pass that found them."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def placeholders(self) -> list[fx.Node]:
        """The placeholder nodes in order: inputs, then states."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def output_node(self, name: str) -> fx.Node:
        """The node that computes output `name`."""
        return self.graph.output_node().args[0][self.outputs.index(name)]  # type: ignore[index,return-value]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor the graph reads by name: parameters, buffers, tables."""
        return {n.target: fetch(self.module, n.target) for n in self.graph.nodes if n.op == "get_attr"}  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where the program's tensors are; the CPU when it has none."""
        return next((t.device for t in self.tensors().values()), torch.device("cpu"))

    def clone(self) -> Program:
        """A copy with its own graph that shares the tensors."""
        root = torch.nn.Module()
        for name, tensor in self.tensors().items():
            store(root, name, tensor)
        graph = fx.Graph()
        remap: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, remap)
        graph.output(output)
        for old, new in remap.items():
            new.meta = copy.copy(old.meta)
        return replace(self, module=graph_module(root, graph), facts=dict(self.facts))

    def run(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the graph eagerly, node by node (`args`: inputs, then states); the reference way to execute a program."""
        with torch.no_grad():
            result: tuple[torch.Tensor, ...] = fx.Interpreter(self.module).run(*args)
        return result

    def __str__(self) -> str:
        lines = [f"program {self.name}({', '.join(self.inputs)}) -> {', '.join(self.outputs)}  [{self.exactness}]"]
        lines += [
            f"  state {s.name} {list(s.shape)} {s.dtype}, {s.bytes_per_token()} bytes a token" for s in self.states
        ]
        lines += [f"  {record}" for record in self.history]
        return "\n".join(lines)

    def listing(self) -> str:
        """The header, and every node with its arguments, shape, dtype and origin, one a line."""
        return "\n".join([str(self), *(f"  {describe(node)}" for node in self.graph.nodes)])


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that generates its Python code only if it is called as a function, which costs as much as a
    pass.
    """
    return lazy_graph_module(root, graph)


def fetch(root: torch.nn.Module, path: str) -> torch.Tensor:
    """The tensor at a dotted attribute path."""
    *parents, leaf = path.split(".")
    for part in parents:
        root = getattr(root, part)
    value: torch.Tensor = getattr(root, leaf)
    return value


def store(root: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Put a tensor at a dotted attribute path, creating plain modules on the way; parameters keep no gradient."""
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    if leaf in root._buffers:
        root._buffers[leaf] = tensor.detach()
    else:
        root.register_buffer(leaf, tensor.detach())


def check(program: Program) -> None:
    """Raise `InvariantError` unless the program is well formed.

    1. The graph lints, and every node is a placeholder, get_attr, call_function or the one output.
    2. Placeholders are exactly the inputs followed by the states, in order, and names are unique.
    3. The output returns a tuple of nodes, one per output name, and these are unique.
    4. Every call is an operator overload, a `getitem`, or arithmetic on sizes (which yields no tensor).
    5. Every get_attr names a tensor that exists and is not on the meta device.
    6. Only states are mutated: the mutated argument of an operator is a state's placeholder.
    7. Every state is mutated, has B at dim 0 and S at its time dim, and carries no other symbol.
    """
    graph = program.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise InvariantError(f"graph of {program.name!r} does not lint: {error}") from error
    names = [n.name for n in program.placeholders()]
    expected = [*program.inputs, *(s.name for s in program.states)]
    if [str(n.target) for n in program.placeholders()] != expected:
        raise InvariantError(f"placeholders of {program.name!r} are {names}, expected {expected}")
    if len(set(expected)) != len(expected):
        raise InvariantError(f"inputs and states of {program.name!r} do not have unique names: {expected}")
    returned = graph.output_node().args[0]
    if not isinstance(returned, tuple) or len(returned) != len(program.outputs):
        raise InvariantError(f"{program.name!r} must return a tuple of {len(program.outputs)} named outputs")
    if len(set(program.outputs)) != len(program.outputs):
        raise InvariantError(f"the outputs of {program.name!r} do not have unique names: {program.outputs}")
    for name, value in zip(program.outputs, returned):
        if not isinstance(value, fx.Node):
            raise InvariantError(f"output {name} of {program.name!r} is not a node but {value!r}")
    states = {n for n in program.placeholders() if n.target in {s.name for s in program.states}}
    mutated: set[fx.Node] = set()
    for node in graph.nodes:
        _check_node(program, node)
        for argument in mutated_arguments(node):
            if argument not in states:
                raise InvariantError(
                    f"{node.name} mutates {argument}, which is not a state", where="\n" + around(graph, node)
                )
            mutated.add(argument)
    for spec in program.states:
        if spec.shape[0] != "B" or spec.shape[spec.time_dim] != "S" or sum(isinstance(d, str) for d in spec.shape) != 2:
            raise InvariantError(f"state {spec.name} has shape {spec.shape}: wants B at dim 0 and S at {spec.time_dim}")
    idle = {n.name for n in states - mutated}
    if idle:
        raise InvariantError(f"states never written: {sorted(idle)}")


def mutated_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that an operator's schema says it writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                yield value


def _check_node(program: Program, node: fx.Node) -> None:
    if problem := _problem(program, node):
        raise InvariantError(problem, where="\n" + around(program.graph, node))


def _problem(program: Program, node: fx.Node) -> str:
    """What is wrong with one node by itself; empty when nothing is."""
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        return f"{node.op} nodes are not allowed"
    if node.op == "get_attr":
        tensor = fetch(program.module, str(node.target))  # lint has seen that it exists
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return f"{node.target} is not a tensor with data"
    if node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
        if node.target is operator.getitem:
            return ""
        if not _is_size_arithmetic(node.target) or isinstance(node.meta.get("val"), torch.Tensor):
            return f"{node.target} is not an operator overload"
    return ""


def _is_size_arithmetic(target: object) -> bool:
    """Python operators, `math`, torch's symbolic functions (sym_max, ...) and those that sympy expressions print as."""
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module == "torch":
        return name.startswith(("sym_", "_sym_"))
    return module in ("_operator", "math", "torch.utils._sympy.functions")
