"""Names of what programs call: operator overloads of `torch.ops`, and a fixed list of arithmetic on sizes."""

from __future__ import annotations

import math
import operator
import re
import types
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch

from accelc.ir.errors import ProgramFormatError

NAMESPACES: Collection[str] = ("aten", "accelc")
"""Namespaces of the operators that a program of unknown origin may call."""
REFUSED = frozenset({"aten.from_file.default", "aten.from_file.out"})
"""Operators that reach outside the program's tensors."""

GROUPED = ("transformers::grouped_mm_fallback", "aten::_grouped_mm")
"""Products of rows, sorted by expert, with a stack of matrices [E, K, N]; the third argument has the experts' ends."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ARITY: dict[types.ModuleType, dict[int, tuple[str, ...]]] = {
    operator: {
        1: ("neg", "pos", "abs", "not_", "invert"),
        2: (
            "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "lshift", "rshift",
            "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor",
        ),
    },
    math: {1: ("ceil", "floor", "trunc", "sqrt", "log2", "exp")},
    torch: {1: ("sym_not", "sym_int", "sym_float", "sym_sum"), 2: ("sym_max", "sym_min"), 3: ("sym_ite",)},
}  # fmt: skip
"""The arithmetic on sizes that programs may call: names by module and number of arguments."""
FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    f"{module.__name__}.{name}": (getattr(module, name), arity)
    for module, by_arity in _ARITY.items()
    for arity, names in by_arity.items()
    for name in names
}
_NAMES = {function: name for name, (function, _) in FUNCTIONS.items()}


def schema_name(target: object) -> str:
    """The name of an operator without its overload, such as "aten::add"; "" for what is none."""
    return target.name().split(".")[0] if isinstance(target, torch._ops.OpOverload) else ""


def target_name(target: object) -> str:
    """The stored name of what a node calls, such as "aten.add.Tensor". Raises ProgramFormatError when it has none."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if resolve(name, None) is target:
            return name
    elif target in _NAMES:
        return _NAMES[target]  # type: ignore[index]
    raise ProgramFormatError(f"{target} has no stored form", remedy="Express it in operators of torch.ops.")


def resolve(name: str, namespaces: Collection[str] | None = NAMESPACES, where: str = "") -> Callable[..., Any]:
    """What a stored name calls; only registered operators and the functions in `FUNCTIONS` can be named.

    Raises ProgramFormatError.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name][0]
    parts = name.split(".")
    if len(parts) != 3 or not all(_IDENTIFIER.fullmatch(p) for p in parts) or name in REFUSED:
        raise ProgramFormatError(f"{name[:80]!a} is no operator that a program may call", where=where)
    if namespaces is not None and parts[0] not in namespaces:
        raise ProgramFormatError(f"{name} is not of {', '.join(namespaces)}", where=where)
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ProgramFormatError(
            f"no operator {name} is registered", where=where, remedy="Import the library that defines it first."
        )
    return found


@cache
def _signature(target: torch._ops.OpOverload) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Names of the positional arguments in order, of all arguments, and of those without a default."""
    arguments = target._schema.arguments
    positional = tuple(a.name for a in arguments if not a.kwarg_only)
    required = frozenset(a.name for a in arguments if not a.has_default_value())
    return positional, frozenset(a.name for a in arguments), required


def check_call(target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
    """Whether the arguments fit by number and name; their types are the operator's own business."""
    if name in FUNCTIONS:
        if len(args) != FUNCTIONS[name][1] or kwargs:
            raise ProgramFormatError(f"{name} takes {FUNCTIONS[name][1]} arguments", where=where)
        return
    positional, known, required = _signature(target)
    given = positional[: len(args)]
    unfit = len(args) > len(positional) or not known.issuperset(kwargs) or set(given).intersection(kwargs)
    if unfit or not required.issubset({*given, *kwargs}):
        raise ProgramFormatError(f"the arguments do not fit {target._schema}", where=where)
