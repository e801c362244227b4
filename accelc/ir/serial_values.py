"""Values inside a stored program as JSON: arguments of nodes, options of passes, facts.

null, booleans, numbers, strings and lists stand for themselves; whatever JSON lacks is an object with one key, its tag:
{"node": "add_1"}, {"tuple": [...]}, {"dict": [[key, value], ...]}, {"float": "inf"}, {"dtype": "float32"}, ...
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from accelc.ir.errors import ProgramFormatError

MAX_DEPTH = 16
"""Deepest nesting of a value; real arguments use three levels."""
INTEGERS = range(-(1 << 63), 1 << 64)
"""What a size, an index or a mask can be."""

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,3})?")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _named(kind: type) -> dict[str, Any]:
    """torch's constants of one type by the name they print as."""
    return {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)}


CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": _named(torch.dtype),
    "layout": _named(torch.layout),
    "memory_format": _named(torch.memory_format),
}
"""Tags of torch's constants, each with its values by name."""


def encode(value: object, where: str = "", *, lenient: bool = False, depth: int = 0) -> Any:
    """`value` as JSON. ``lenient``: an object of another type becomes text (facts and options are read by people);
    otherwise, and for nesting beyond `MAX_DEPTH`, ProgramFormatError."""
    if depth > MAX_DEPTH:
        raise ProgramFormatError(f"a value is nested deeper than {MAX_DEPTH}", where=where)

    def inner(part: object) -> Any:
        return encode(part, where, lenient=lenient, depth=depth + 1)

    if value is None or isinstance(value, bool):
        return value
    if lenient and isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and int(value) in INTEGERS:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, complex):
        return {"complex": [inner(value.real), inner(value.imag)]}
    if isinstance(value, list):
        return [inner(v) for v in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [inner(v) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": [[k, inner(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [inner(value.start), inner(value.stop), inner(value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, constants in CONSTANTS.items():
        if (name := str(value).removeprefix("torch.")) in constants and constants[name] is value:
            return {tag: name}
    if isinstance(value, fx.Node) and not lenient:
        return {"node": value.name}
    if lenient:
        return inner(_readable(value))
    raise ProgramFormatError(f"{type(value).__name__} {value!r} has no stored form", where=where)


def decode(value: Any, nodes: Mapping[str, fx.Node], where: str = "", depth: int = 0) -> Any:
    """The value that `encode` wrote; `nodes` are those that it may refer to. Raises ProgramFormatError."""
    if depth > MAX_DEPTH:
        raise ProgramFormatError(f"a value is nested deeper than {MAX_DEPTH}", where=where)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and value in INTEGERS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [decode(v, nodes, where, depth + 1) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ProgramFormatError(f"{shortened(value)} is no value", where=where)
    ((tag, content),) = value.items()
    if tag == "node":
        if not isinstance(content, str) or content not in nodes:
            raise ProgramFormatError(f"{shortened(content)} is no node before its use", where=where)
        return nodes[content]
    if tag in CONSTANTS:
        if not isinstance(content, str) or content not in CONSTANTS[tag]:
            raise ProgramFormatError(f"{shortened(content)} is no {tag}", where=where)
        return CONSTANTS[tag][content]
    if tag not in _DECODERS:
        raise ProgramFormatError(f"unknown tag {shortened(tag)}", where=where)
    return _DECODERS[tag](content, lambda v: decode(v, nodes, where, depth + 1), where)


Inner = Callable[[Any], Any]


def _decode_float(content: Any, inner: Inner, where: str) -> float:
    if not isinstance(content, str) or content not in _NON_FINITE:
        raise ProgramFormatError(f"{shortened(content)} is no non-finite float", where=where)
    return _NON_FINITE[content]


def _decode_complex(content: Any, inner: Inner, where: str) -> complex:
    parts = [inner(v) for v in _items(content, "complex", where, 2)]
    if not all(type(v) is float for v in parts):
        raise ProgramFormatError(f"{shortened(content)} is no complex number", where=where)
    return complex(*parts)


def _decode_tuple(content: Any, inner: Inner, where: str) -> tuple[Any, ...]:
    return tuple(inner(v) for v in _items(content, "tuple", where))


def _decode_dict(content: Any, inner: Inner, where: str) -> dict[str, Any]:
    pairs = [_items(pair, "dict entry", where, 2) for pair in _items(content, "dict", where)]
    if not all(isinstance(key, str) for key, _ in pairs) or len({key for key, _ in pairs}) != len(pairs):
        raise ProgramFormatError(f"{shortened(content)} has keys that are no strings, or twice the same", where=where)
    return {key: inner(v) for key, v in pairs}


def _decode_slice(content: Any, inner: Inner, where: str) -> slice:
    parts = [inner(v) for v in _items(content, "slice", where, 3)]
    if not all(v is None or type(v) is int or isinstance(v, fx.Node) for v in parts):
        raise ProgramFormatError(f"{shortened(content)} is no slice", where=where)
    return slice(*parts)


def _decode_device(content: Any, inner: Inner, where: str) -> torch.device:
    if isinstance(content, str) and _DEVICE.fullmatch(content):
        try:
            return torch.device(content)
        except RuntimeError as error:  # torch knows no such device type
            raise ProgramFormatError(f"{content!r} is no device", where=where) from error
    raise ProgramFormatError(f"{shortened(content)} is no device", where=where)


_DECODERS: dict[str, Callable[[Any, Inner, str], Any]] = {
    "float": _decode_float,
    "complex": _decode_complex,
    "tuple": _decode_tuple,
    "dict": _decode_dict,
    "slice": _decode_slice,
    "device": _decode_device,
}


def _items(content: Any, what: str, where: str, count: int | None = None) -> list[Any]:
    if not isinstance(content, list) or (count is not None and len(content) != count):
        raise ProgramFormatError(f"{shortened(content)} are no {what} items", where=where)
    return content


def _readable(value: object) -> object:
    """An object as its own text, its fields, or its representation without the address, which varies."""
    if type(value).__str__ is not object.__str__:
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return _ADDRESS.sub("", repr(value))


def shortened(value: object) -> str:
    """A value of a file for a message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
