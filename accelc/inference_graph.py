"""Between an inference graph of torch.compile and a Program: what passes may see of a graph, and how it is put back.

The graphs that reach a torch.compile backend are any part of any module. As Programs they look like all others, so the
same passes run on them:

- The inputs are whatever the graph reads: activations, sizes (SymInt), and parameters too, because their values may
  change between two calls. Frozen parameters are constants, hence ``get_attr`` nodes, as in a captured model.
- Writes to inputs (a static cache, a batch-norm counter, ``x.add_(1)``) stand at the end of the graph as ``copy_``. In
  the Program they are further outputs, ``write_<input>``: it is a pure function, and a pass cannot reorder a write.
- Operations work on functional, decomposed ATen (Inductor's decompositions), with fake values in ``meta["val"]``.

`accelc.ir.check` holds for them unchanged. A graph it refuses (control flow, opaque mutation) is not for passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from accelc.freezing import Frozen
from accelc.ir import Program, check
from accelc.ir.compat import attribute_of, fill_values, is_decomposed, trace_decomposed
from accelc.ir.dialect import REFERENCES
from accelc.ir.errors import InvariantError, describe
from accelc.ir.program import fetch, store
from accelc.output_contract import keep_outputs

COPY = torch.ops.aten.copy_.default
WRITE = "write_"
CONSTANT = "accelc_constant_"


@dataclass(frozen=True)
class Constant:
    """A frozen parameter: its name in the program, that of the model where there is one, and its value."""

    name: str
    value: torch.Tensor


def to_program(graph: fx.Graph, constants: Mapping[str, Constant]) -> Program:
    """The Program of an inference graph; `graph` stays as it is.

    `constants` gives the frozen parameters by the target of their placeholder; the graph does not write to them. Raises
    `InvariantError` for a graph that is no Program: higher-order operations, operations that mutate or assert, reads of
    an input behind a write to it.
    """
    root = torch.nn.Module()
    pure = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs: list[str] = []
    writes: dict[str, fx.Node] = {}
    returned: tuple[object, ...] = ()
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            if name in constants:
                store(root, constants[name].name, constants[name].value)
                env[node] = pure.get_attr(constants[name].name)
                env[node].meta = dict(node.meta)
            else:
                env[node] = pure.node_copy(node)
                inputs.append(name)
        elif is_input_write(node):
            name = str(node.args[0].target)
            if name in writes:
                raise InvariantError(f"the input {name} is written twice", where=describe(node))
            writes[name] = env[node] = env[node.args[1]]
        elif node.op == "call_function" and not node.users and node.is_impure():
            raise InvariantError(f"{node.name} is called for its effect", where=describe(node))
        elif stale := [n for n in node.all_input_nodes if n.op == "placeholder" and n.target in writes]:
            raise InvariantError(f"{stale[0]} is read behind the write to it", where=describe(node))
        elif node.op == "output":
            returned = tuple(fx.map_arg(node.args[0], env.__getitem__))
        else:
            if node.op == "get_attr":
                _share(graph.owning_module, root, str(node.target))
            env[node] = pure.node_copy(node, env.__getitem__)
    pure.output((*returned, *writes.values()))
    names = (*(f"output_{i}" for i in range(len(returned))), *(WRITE + name for name in writes))
    program = Program("inference", fx.GraphModule(root, pure), tuple(inputs), names)
    check(program)
    return program


def write_back(program: Program, graph: fx.Graph, constants: Mapping[str, Constant]) -> fx.Graph:
    """The inference graph that does what `program`, made with `constants`, says, with the inputs, writes and output
    metadata of `graph`.

    Becomes the graph of `graph`'s module, which gets the tensors that passes added. What Inductor does not fuse is
    expanded. Raises `InvariantError` when passes changed the inputs or outputs,
    `LayoutError` (before anything changed) when an output cannot get back the strides it had.
    """
    module = graph.owning_module
    before, after = graph.output_node(), program.graph.output_node()
    originals = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    written = [name.removeprefix(WRITE) for name in program.outputs if name.startswith(WRITE)]
    if len(program.outputs) - len(written) != len(before.args[0]) or program.states:
        raise InvariantError(f"passes may not change the outputs of an inference graph: {program.outputs}")
    if set(program.inputs) - originals.keys():
        raise InvariantError(f"passes may not add inputs to an inference graph: {program.inputs}")
    fresh = fx.Graph()
    placeholders = {}
    for name, node in originals.items():
        placeholders[name] = fresh.node_copy(node)  # all of them: the caller passes its arguments by place
    frozen = {constant.name: placeholders[target] for target, constant in constants.items()}
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = placeholders[str(node.target)]
        elif node.op == "get_attr":
            env[node] = frozen.get(str(node.target)) or _constant(fresh, module, program.module, node)
        elif node.op != "output":
            env[node] = fresh.node_copy(node, env.__getitem__)
    values = fx.map_arg(after.args[0], env.__getitem__)
    returned, new_values = values[: len(values) - len(written)], values[len(values) - len(written) :]
    fill_values(fresh, module)
    old_values = {str(n.args[0].target): n.args[1] for n in graph.nodes if is_input_write(n)}
    # What was written may be returned as well: then it is the input itself.
    inputs = {
        i: str(old.args[0].target)
        for i, old in enumerate(before.args[0])
        if isinstance(old, fx.Node) and is_input_write(old)
    }
    returned = [None if i in inputs else value for i, value in enumerate(returned)]
    returned = keep_outputs(before.args[0], returned, [old_values[name] for name in written], new_values)
    copies = {}
    for name, value in zip(written, new_values, strict=True):
        copies[name] = fresh.call_function(COPY, (placeholders[name], value))
        copies[name].meta["val"] = placeholders[name].meta["val"]
    for i, name in inputs.items():
        returned[i] = copies[name]
    fresh.output(type(before.args[0])(returned)).meta = dict(before.meta)
    expand(fresh, module, {n.target for n in graph.nodes})
    fresh.lint()
    module.graph = fresh
    return module.graph


def expand(graph: fx.Graph, module: fx.GraphModule, known: Collection[object] = ()) -> int:
    """Replace operations that Inductor would not fuse by what they are made of, traced into decomposed ATen; how many.

    Custom operations are opaque calls to Inductor; the references of the dialect's are not, and fuse with what
    surrounds them. Operations of ATen that Inductor wants decomposed (layer norm) are those that passes put in: what is
    in ``known``, the targets of the graph that Inductor itself made, stays.
    """
    count = 0
    references = {target: target for target in {n.target for n in graph.nodes} - set(known) if is_decomposed(target)}
    references |= REFERENCES
    for node in list(graph.nodes):
        reference = references.get(node.target)
        if reference is None:
            continue
        tensors = [a for a in node.args if isinstance(a, fx.Node)]

        def call(*values: torch.Tensor, node: fx.Node = node, reference: Any = reference) -> torch.Tensor:
            given = iter(values)
            return reference(*(next(given) if isinstance(a, fx.Node) else a for a in node.args), **node.kwargs)

        body = trace_decomposed(call, [a.meta["val"] for a in tensors])
        env = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), tensors, strict=True))
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "output":
                    node.replace_all_uses_with(env[inner.args[0]])
                elif inner.op == "get_attr":
                    env[inner] = _constant(graph, module, body, inner)
                elif inner.op != "placeholder":
                    env[inner] = graph.node_copy(inner, env.__getitem__)
        graph.erase_node(node)
        count += 1
    return count


def constants(graph: fx.Graph, frozen: Frozen) -> dict[str, Constant]:
    """The frozen tensors that the graph does not write to, by the target of their placeholder."""
    attributes = {str(n.target): attribute_of(n) for n in graph.nodes if n.op == "placeholder"}
    written = written_attributes(graph)
    return {
        target: Constant(frozen.paths.get(name, target), frozen.tensors[name])
        for target, name in attributes.items()
        if name and name in frozen.tensors and name not in written
    }


def written_attributes(graph: fx.Graph) -> set[str]:
    """The attributes of the dynamo graph that `graph` writes to."""
    return {name for n in graph.nodes if is_input_write(n) and (name := attribute_of(n.args[0])) is not None}


def is_input_write(node: fx.Node) -> bool:
    """Whether the node is a write to an input, as functionalisation leaves them."""
    return node.target is COPY and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def _share(source: torch.nn.Module, root: torch.nn.Module, path: str) -> None:
    """Put the tensor that `source` has at `path` into `root` too."""
    tensor = fetch(source, path)
    if not isinstance(tensor, torch.Tensor):
        raise InvariantError(f"{path} is a {type(tensor).__name__}: the graph calls another graph")
    store(root, path, tensor)


def _constant(graph: fx.Graph, module: fx.GraphModule, source: torch.nn.Module, node: fx.Node) -> fx.Node:
    """A ``get_attr`` in `graph` of the tensor that `node` reads from `source`; `module` keeps it under a new name."""
    tensor = fetch(source, str(node.target))
    name = next(n for i in itertools.count() if not hasattr(module, n := f"{CONSTANT}{i}"))
    store(module, name, tensor)
    copy = graph.get_attr(name)
    copy.meta = dict(node.meta)
    return copy
