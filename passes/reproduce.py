"""A folder from which one pass can be run again elsewhere: program, pass, inputs, listings and a small script.

Graph and options are pickled: open only folders that you trust.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from safetensors.torch import load_file, save_file
from torch import Tensor

from accelc.ir import Program
from accelc.ir.compat import fill_values, symbolic_values, symbols_in
from accelc.ir.errors import PassError
from accelc.ir.program import store
from accelc.passes.base import Pass

PROGRAM, TENSORS, INPUTS, SCRIPT = "program.pickle", "tensors.safetensors", "inputs.safetensors", "reproduce.py"

_SCRIPT = '''"""{what}

Run: python {script}
"""

import sys
from pathlib import Path

from accelc.passes.manager import apply
from accelc.passes.reproduce import load_reproduction
from accelc.passes.verify import comparable, compare

# {one}
program, one, inputs = load_reproduction(Path(__file__).parent)
after = apply(one, program)
print(after.listing())
if inputs and not comparable(program, after):
    differences = compare(program, after, inputs)
    print(*differences, sep="\\n")
    sys.exit(not all(d.passed for d in differences))
'''


@dataclasses.dataclass(frozen=True)
class _PlainNode:
    """A node without its graph: `args` and `kwargs` name other nodes by persistent id."""

    op: str
    name: str
    target: object
    args: tuple[object, ...]
    kwargs: dict[str, object]
    path: tuple[tuple[str, tuple[str, str]], ...]
    """The module stack: key to (module path, class name)."""


def save_reproduction(
    folder: str | Path, program: Program, one: Pass, inputs: Sequence[Tensor] | None, what: str, after: Program | None
) -> None:
    """Write what is needed to run pass `one` on `program` again; `what` says why, `after` is what it returned, if any.

    The facts that cannot be pickled are left out and named in the script.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "before.txt").write_text(program.listing() + "\n", encoding="utf-8")
    if after is not None:
        (folder / "after.txt").write_text(after.listing() + "\n", encoding="utf-8")
    save_file({n: t.detach().contiguous().clone() for n, t in program.tensors().items()}, folder / TENSORS)
    if inputs is not None:
        save_file({str(i): t.contiguous().clone() for i, t in enumerate(inputs)}, folder / INPUTS)
    left_out = [name for name, fact in program.facts.items() if not _can_pickle(fact)]
    plain = dataclasses.replace(
        program, module=None, facts={k: v for k, v in program.facts.items() if k not in left_out}
    )  # type: ignore[type-var]
    nodes = [_plain(node) for node in program.graph.nodes]
    with open(folder / PROGRAM, "wb") as file:
        _Pickler(file).dump((plain, nodes, _describe_inputs(program), _place(one), one.options()))
    if left_out:
        what += f"\n\nFacts of the program that are not in the folder: {', '.join(left_out)}."
    (folder / SCRIPT).write_text(_SCRIPT.format(what=what, script=SCRIPT, one=one), encoding="utf-8")


def load_reproduction(folder: str | Path) -> tuple[Program, Pass, list[Tensor] | None]:
    """The program before the pass, the pass, and the inputs, as `save_reproduction` wrote them.

    Raises `PassError` when the class of the pass cannot be imported here.
    """
    folder = Path(folder)
    root, graph, env = torch.nn.Module(), fx.Graph(), dict[str, fx.Node]()
    for name, tensor in load_file(folder / TENSORS).items():
        store(root, name, tensor)
    with open(folder / PROGRAM, "rb") as file:
        plain, nodes, inputs, place, options = _Unpickler(file).load()
    values = iter(symbolic_values(*inputs))
    for node in nodes:
        args, kwargs = _link((node.args, node.kwargs), env)
        new = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta["nn_module_stack"] = dict(node.path)
        if node.op == "placeholder":
            new.meta["val"] = next(values)
        env[node.name] = new
    program = dataclasses.replace(plain, module=fx.GraphModule(root, graph))
    fill_values(program.graph, program.module)
    given = None
    if (folder / INPUTS).exists():
        tensors = load_file(folder / INPUTS)
        given = [tensors[str(i)] for i in range(len(tensors))]
    return program, _find(*place)(**options), given


@dataclasses.dataclass(frozen=True)
class _Ref:
    """Stands for the node of that name."""

    name: str


class _Pickler(pickle.Pickler):
    """Operators go by name; torch does not pickle them in all versions."""

    def persistent_id(self, value: Any) -> object:
        if isinstance(value, torch._ops.OpOverload):
            return str(value)
        if isinstance(value, fx.Node):
            raise pickle.PicklingError(f"{value} is a node of a graph")
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: str) -> object:
        namespace, op, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _place(one: Pass) -> tuple[str, str]:
    return type(one).__module__, type(one).__qualname__


def _find(module: str, qualname: str) -> type[Pass]:
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise PassError(
            f"the pass {qualname} cannot be imported: {error}",
            where=f"module {module}",
            remedy="Move the class to the top of a module, and put that module on the path (PYTHONPATH).",
        ) from error
    return found


def _can_pickle(value: object) -> bool:
    try:
        _Pickler(io.BytesIO()).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return True


def _plain(node: fx.Node) -> _PlainNode:
    stack = node.meta.get("nn_module_stack") or {}
    path = tuple((str(k), (str(v[0]), str(v[1]))) for k, v in stack.items())
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Ref(n.name))
    return _PlainNode(node.op, node.name, node.target, _builtin(args), _builtin(kwargs), path)


def _builtin(value: Any) -> Any:
    """fx's immutable lists and dicts as plain ones."""
    if isinstance(value, dict):
        return {k: _builtin(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_builtin, value))
    return list(map(_builtin, value)) if isinstance(value, list) else value


def _link(value: Any, env: dict[str, fx.Node]) -> Any:
    if isinstance(value, _Ref):
        return env[value.name]
    if isinstance(value, dict):
        return {k: _link(v, env) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_link(v, env) for v in value)
    return value


def _describe_inputs(program: Program) -> tuple[list[Any], dict[str, tuple[int, int, int]]]:
    """Per placeholder (shape, dtype, device) or a size, symbols as strings; per symbol its hint, least and most."""
    described: list[Any] = []
    symbols: dict[str, tuple[int, int, int]] = {}

    def size(value: int | torch.SymInt) -> int | str:
        if isinstance(value, int):
            return value
        symbols.update(symbols_in(value))
        return str(value.node.expr)

    for node in program.placeholders():
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            described.append(([size(n) for n in value.shape], value.dtype, value.device))
        else:
            described.append(size(value) if isinstance(value, int | torch.SymInt) else value)
    return described, symbols
