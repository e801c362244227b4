"""Programs as data: `dump` to plain JSON values and `load` back, without pickle and without evaluating anything.

A stored program is a flat list of nodes that call operators of an allow-list, the names, shapes and dtypes of the
tensors it reads (their data is kept elsewhere), and what the fields of `Program` say. Fake values are not stored: they
are recomputed by `accelc.ir.shapes.propagate`. Equal programs give equal bytes.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.fx as fx

from accelc.ir.errors import InvariantError, ProgramFormatError
from accelc.ir.exactness import Exactness
from accelc.ir.operators import NAMESPACES, check_call, resolve, target_name
from accelc.ir.program import PassRecord, Program, check, store
from accelc.ir.serial_values import CONSTANTS, decode, encode, shortened
from accelc.ir.state import BATCH, SLOTS, StateSpec

FORMAT = "accelc.program/1"
MAX_BYTES = 64 << 20
MAX_NODES = 1 << 17

_PARTS = {"placeholder": {"target"}, "get_attr": {"target"}, "call_function": {"target", "args"}, "output": {"args"}}
"""What each kind of node is described by, besides its name; calls may have kwargs too."""
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def dumps(program: Program) -> bytes:
    """`dump` as bytes; the same program always gives the same ones."""
    return json.dumps(dump(program), separators=(",", ":"), allow_nan=False).encode("ascii")


def loads(
    text: bytes, tensors: Mapping[str, torch.Tensor], *, namespaces: Collection[str] | None = NAMESPACES
) -> Program:
    """`load` from bytes. Raises ProgramFormatError, also for what is not JSON or is larger than `MAX_BYTES`."""
    if len(text) > MAX_BYTES:
        raise ProgramFormatError(f"{len(text)} bytes are more than the {MAX_BYTES} allowed")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, and integers of thousands of digits
        raise ProgramFormatError(f"not JSON: {error}") from error
    return load(data, tensors, namespaces=namespaces)


def dump(program: Program) -> dict[str, Any]:
    """A program as JSON values, without its tensors' data and without ``meta["val"]``.

    Objects in facts and options that JSON cannot hold become text. Raises ProgramFormatError where the program calls or
    contains something that has no stored form.
    """
    return {
        "format": FORMAT,
        "name": program.name,
        "inputs": list(program.inputs),
        "outputs": list(program.outputs),
        "states": [_dump_state(spec) for spec in program.states],
        "exactness": str(program.exactness),
        "tensors": {path: _dump_tensor(tensor) for path, tensor in program.tensors().items()},
        "nodes": [_dump_node(node) for node in program.graph.nodes],
        "history": [_dump_record(record) for record in program.history],
        "facts": encode(program.facts, "facts", lenient=True),
    }


def load(data: Any, tensors: Mapping[str, torch.Tensor], *, namespaces: Collection[str] | None = NAMESPACES) -> Program:
    """The program that `dump` wrote, reading `tensors` by the paths of its get_attr nodes; they are shared, not copied.

    ``namespaces``: whose operators it may call; None admits every operator that is registered in this process.
    Everything is validated, the invariants of `accelc.ir.program.check` included. Raises ProgramFormatError, which
    names the place.
    """
    fields = _record(
        data, "program", format=str, name=str, inputs=list, outputs=list, states=list, exactness=str, tensors=dict,
        nodes=list, history=list, facts=dict,
    )  # fmt: skip
    if fields["format"] != FORMAT:
        raise ProgramFormatError(f"format {shortened(fields['format'])} is not {FORMAT}")
    if len(fields["nodes"]) > MAX_NODES:
        raise ProgramFormatError(f"{len(fields['nodes'])} nodes are more than the {MAX_NODES} allowed")
    root = _load_tensors(fields["tensors"], tensors)
    graph = _load_graph(fields["nodes"], fields["tensors"], namespaces)
    program = Program(
        name=fields["name"],
        module=fx.GraphModule(root, graph),
        inputs=_strings(fields["inputs"], "inputs"),
        outputs=_strings(fields["outputs"], "outputs"),
        states=tuple(_load_state(s, f"states[{i}]") for i, s in enumerate(fields["states"])),
        exactness=_exactness(fields["exactness"], "exactness"),
        history=tuple(_load_record(r, f"history[{i}]") for i, r in enumerate(fields["history"])),
        facts=_dictionary(fields["facts"], "facts"),
    )
    try:
        check(program)
    except InvariantError as error:
        raise ProgramFormatError(f"not a well-formed program: {error.what}", where=error.where) from error
    return program


# -- nodes -------------------------------------------------------------------------------------------------------------


def _dump_node(node: fx.Node) -> dict[str, Any]:
    where = f"node {node.name}"
    stored: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        stored |= {"target": target_name(node.target), "args": encode(list(node.args), where)}
        if node.kwargs:
            stored["kwargs"] = {key: encode(value, where) for key, value in node.kwargs.items()}
    elif node.op == "output":
        stored["args"] = encode(list(node.args), where)
    elif node.op in ("placeholder", "get_attr") and not node.args:
        stored["target"] = str(node.target)
    else:
        raise ProgramFormatError(f"{node.op} with {len(node.args)} arguments has no stored form", where=where)
    if isinstance(forward := node.meta.get("forward"), str):
        stored["forward"] = forward
    if path := _module_path(node):
        stored["module"] = path
    return stored


def _module_path(node: fx.Node) -> str:
    """The innermost module that a node came from, by its path in the model."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    last = stack[-1] if stack else ""
    return str(last[0] if isinstance(last, tuple) else last)


def _load_graph(stored: list[Any], paths: Collection[str], namespaces: Collection[str] | None) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    read: set[str] = set()
    for index, one in enumerate(stored):
        fields = _record(
            one, f"nodes[{index}]", optional=("target", "args", "kwargs", "forward", "module"),
            name=str, op=str, target=str, args=list, kwargs=dict, forward=str, module=str,
        )  # fmt: skip
        where = f"nodes[{index}] {_identifier(fields['name'], f'nodes[{index}]')}"
        if (fields["op"] == "output") != (index == len(stored) - 1):
            raise ProgramFormatError("the output must be the last node, and the only one of its kind", where=where)
        nodes[fields["name"]] = node = _create(graph, fields, nodes, namespaces, where)
        if node.op == "get_attr":
            read.add(str(node.target))
        if node.name != fields["name"]:
            raise ProgramFormatError(f"{fields['name']!r} is taken or reserved", where=where)
        if "forward" in fields:
            node.meta["forward"] = fields["forward"]
        if "module" in fields:
            node.meta["nn_module_stack"] = {fields["module"]: (fields["module"], "")}
    if not stored:
        raise ProgramFormatError("no nodes")
    if read != set(paths):
        unmatched = sorted(read.symmetric_difference(paths))
        raise ProgramFormatError(f"tensors are read but not described, or the reverse: {shortened(unmatched)}")
    return graph


def _create(
    graph: fx.Graph,
    fields: dict[str, Any],
    nodes: Mapping[str, fx.Node],
    namespaces: Collection[str] | None,
    where: str,
) -> fx.Node:
    """Append one node; names and targets end up in generated code, so only identifiers pass."""
    name, op = fields["name"], fields["op"]
    if op not in _PARTS:
        raise ProgramFormatError(f"nodes of kind {shortened(op)} are not allowed", where=where)
    present = {"target", "args", "kwargs"}.intersection(fields)
    if present - ({"kwargs"} if op == "call_function" else set()) != _PARTS[op]:
        raise ProgramFormatError(f"{op} with {sorted(present)}", where=where)
    if op == "placeholder":
        return graph.create_node(op, _identifier(fields["target"], where), name=name)
    if op == "get_attr":
        return graph.create_node(op, fields["target"], name=name)
    args = tuple(decode(a, nodes, where) for a in fields["args"])
    if op == "output":
        if len(args) != 1:
            raise ProgramFormatError("an output has one argument", where=where)
        return graph.create_node(op, "output", args, name=name)
    kwargs = {_identifier(k, where): decode(v, nodes, where) for k, v in fields.get("kwargs", {}).items()}
    target = resolve(fields["target"], namespaces, where)
    check_call(target, fields["target"], args, kwargs, where)
    return graph.create_node(op, target, args, kwargs, name=name)


# -- tensors, states, records ------------------------------------------------------------------------------------------


def _dump_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _load_tensors(stored: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A module that holds the described tensors at their paths."""
    root = torch.nn.Module()
    parents = {path.rsplit(".", n)[0] for path in stored for n in range(1, min(path.count("."), 32) + 1)}
    for path, one in stored.items():
        where = f"tensor {shortened(path)}"
        fields = _record(one, where, dtype=str, shape=list)
        for part in path.split("."):
            if not part.isdecimal() or not part.isascii():
                _identifier(part, where)
            if hasattr(torch.nn.Module, part):
                raise ProgramFormatError(f"{part!r} is an attribute of every module", where=where)
        if path in parents or path.count(".") > 32:
            raise ProgramFormatError("the path is that of a module, or too long", where=where)
        tensor = tensors.get(path)
        if not isinstance(tensor, torch.Tensor):
            raise ProgramFormatError("the tensor is missing", where=where, remedy="Give the model that was captured.")
        if _dump_tensor(tensor) != fields:
            raise ProgramFormatError(
                f"the tensor is {tensor.dtype} {list(tensor.shape)}, expected {shortened(one)}", where=where
            )
        store(root, path, tensor)
    return root


def _dump_state(spec: StateSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "time_dim": spec.time_dim,
        "origin": spec.origin,
    }


def _load_state(stored: Any, where: str) -> StateSpec:
    fields = _record(stored, where, name=str, shape=list, dtype=str, time_dim=int, origin=str)
    for size in fields["shape"]:
        if size not in (BATCH, SLOTS) and not (type(size) is int and size in range(1 << 32)):
            raise ProgramFormatError(f"{shortened(size)} is no size of a state", where=where)
    if fields["time_dim"] not in range(len(fields["shape"])):
        raise ProgramFormatError(f"time dim {fields['time_dim']} of {len(fields['shape'])}", where=where)
    if fields["dtype"] not in CONSTANTS["dtype"]:
        raise ProgramFormatError(f"{shortened(fields['dtype'])} is no dtype", where=where)
    dtype = CONSTANTS["dtype"][fields["dtype"]]
    return StateSpec(fields["name"], tuple(fields["shape"]), dtype, fields["time_dim"], fields["origin"])


def _dump_record(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "options": encode(record.options, f"options of {record.name}", lenient=True),
        "matches": record.matches,
        "seconds": float(record.seconds),
        "exactness": str(record.exactness),
        "notes": list(record.notes),
    }


def _load_record(stored: Any, where: str) -> PassRecord:
    fields = _record(stored, where, name=str, options=dict, matches=int, seconds=float, exactness=str, notes=list)
    fields["options"] = _dictionary(fields["options"], where)
    fields["exactness"] = _exactness(fields["exactness"], where)
    fields["notes"] = _strings(fields["notes"], where)
    return PassRecord(**fields)


# -- validation --------------------------------------------------------------------------------------------------------


def _record(data: Any, where: str, *, optional: Collection[str] = (), **types: type) -> dict[str, Any]:
    """`data` when it is an object with exactly these keys, `optional` ones aside, of these types."""
    if not isinstance(data, dict):
        raise ProgramFormatError(f"{shortened(data)} is no object", where=where)
    if missing := types.keys() - data.keys() - set(optional):
        raise ProgramFormatError(f"{', '.join(sorted(missing))} missing", where=where)
    for key, value in data.items():
        if key not in types:
            raise ProgramFormatError(f"unknown key {shortened(key)}", where=where)
        if type(value) is not types[key]:
            raise ProgramFormatError(f"{key} is {shortened(value)}, not a {types[key].__name__}", where=where)
    return dict(data)


def _strings(values: list[Any], where: str) -> tuple[str, ...]:
    if not all(isinstance(v, str) for v in values):
        raise ProgramFormatError(f"{shortened(values)} are not all strings", where=where)
    return tuple(values)


def _dictionary(value: Any, where: str) -> dict[str, Any]:
    result = decode(value, {}, where)
    if not isinstance(result, dict):
        raise ProgramFormatError(f"{shortened(value)} is no dictionary", where=where)
    return result


def _exactness(name: str, where: str) -> Exactness:
    by_name = {str(e): e for e in Exactness}
    if name not in by_name:
        raise ProgramFormatError(f"{shortened(name)} is no exactness", where=where)
    return by_name[name]


def _identifier(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise ProgramFormatError(f"{shortened(name)} is no identifier", where=where)
    return name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
