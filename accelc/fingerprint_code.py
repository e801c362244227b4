"""Hashing code: classes, functions and modules, for fingerprints.

Code of the standard library, torch and transformers is known by their versions; of it only the place where each
function was written is hashed, which reveals functions that were replaced. Of all other code, the file, the compiled
code of every function (the file may have been edited since it was imported), its closure, and the modules it refers to
are hashed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelc.ir.errors import UncacheableError

if TYPE_CHECKING:
    from accelc.fingerprint import Feed

_CONSTANTS = (bool, int, float, str, bytes, types.NoneType)
_files: dict[str, tuple[tuple[int, int], str]] = {}


def file_digest(path: str) -> str:
    """sha256 of a file's content, remembered for as long as its time and size stay. Raises OSError."""
    status = os.stat(path)
    stamp = (status.st_mtime_ns, status.st_size)
    if path not in _files or _files[path][0] != stamp:
        with open(path, "rb") as file:
            _files[path] = (stamp, hashlib.sha256(file.read()).hexdigest())
    return _files[path][1]


def feed_class(feed: Feed, cls: type, where: str) -> None:
    """Hash a class: its ancestors, their functions, and their attributes that are plain values."""
    for base in cls.__mro__:
        if base in (object, nn.Module):
            continue
        feed.add("class", base.__module__, base.__qualname__)
        if not feed.first(base):
            continue
        module = sys.modules.get(base.__module__)
        if not base.__flags__ & _HEAP_TYPE:
            continue  # written in C: part of the interpreter or of a library
        file = getattr(module, "__file__", None)
        if module is None or file is None or not os.path.isfile(file):
            raise UncacheableError(f"the source of class {base.__qualname__} is not known", where=where)
        feed_module(feed, module)
        for name, value in sorted(vars(base).items()):
            if type(value) in _CONSTANTS and not name.startswith("__"):
                feed.add(name, value)
            for function in _functions(value):
                feed.add(name)
                feed_function(feed, function, where)


_HEAP_TYPE = 1 << 9
"""CPython's flag of classes made by a class statement."""


def _functions(value: object) -> list[types.FunctionType]:
    """The functions behind an attribute of a class."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    found: list[object] = [value.fget, value.fset] if isinstance(value, property) else [value]
    if isinstance(value, functools.cached_property):
        found = [value.func]
    return [f for f in found if isinstance(f, types.FunctionType)]


def feed_function(feed: Feed, function: types.FunctionType, where: str) -> None:
    """Hash a function written in Python, with what it closes over."""
    code = function.__code__
    feed.add("function", function.__module__, function.__qualname__)
    if not feed.first(function):
        return
    cells = [_content(cell) for cell in function.__closure__ or ()]
    if is_versioned(code.co_filename):
        feed.add(code.co_filename, code.co_firstlineno)
        for cell in cells:  # a decorator's wrapper: what it wraps may be anybody's
            if isinstance(cell, types.FunctionType):
                feed_function(feed, cell, where)
            elif type(cell) in _CONSTANTS:
                feed.add(cell)
        return
    _feed_code(feed, code)
    where = f"{where}, function {function.__qualname__}"
    feed.value(function.__defaults__, where)
    feed.value(function.__kwdefaults__, where)
    for name, cell in zip(code.co_freevars, cells, strict=True):
        feed.value(cell, f"{where}, closure over {name}")
    if (module := sys.modules.get(function.__module__ or "")) is not None:
        feed_module(feed, module)


def feed_module(feed: Feed, module: types.ModuleType) -> None:
    """Hash a module of Python code: its functions, and unless it is versioned its file, its plain globals, and the
    modules that it takes things from, as far as they are of the same package or not installed."""
    feed.add("module", module.__name__)
    if not feed.first(module):
        return
    file = getattr(module, "__file__", None)
    versioned = file is None or is_versioned(file)
    if file is not None and not versioned and os.path.isfile(file):
        feed.add(file_digest(file))
    for name, value in sorted(vars(module).items()):
        if isinstance(value, types.FunctionType):
            _feed_global(feed, name, value, f"{module.__name__}.{name}")
        elif versioned or name.startswith("__"):
            continue
        elif type(value) in _CONSTANTS:
            feed.add(name, value)
        elif (other := _module_of(value)) is not None and other is not module and _follows(module, other):
            feed_module(feed, other)


def _feed_global(feed: Feed, name: str, function: types.FunctionType, where: str) -> None:
    """Hash a function that a module can call: of installed packages its place and file, otherwise all of it."""
    file = function.__code__.co_filename
    feed.add(name, function.__qualname__, file, function.__code__.co_firstlineno)
    if _is_installed(file) and os.path.isfile(file):
        if not is_versioned(file):
            feed.add(file_digest(file))
    elif not is_versioned(file):
        feed_function(feed, function, where)


def _module_of(value: object) -> types.ModuleType | None:
    """The module that a global is, or comes from."""
    if isinstance(value, types.ModuleType):
        return value
    name = getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) else None


def _follows(module: types.ModuleType, other: types.ModuleType) -> bool:
    file = getattr(other, "__file__", None)
    if file is None or is_versioned(file):
        return False
    return module.__name__.split(".")[0] == other.__name__.split(".")[0] or not _is_installed(file)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _feed_code(feed: Feed, code: types.CodeType) -> None:
    feed.add(code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _feed_code(feed, constant)
        elif isinstance(constant, frozenset):
            feed.add(sorted(map(repr, constant)))
        else:
            feed.add(constant)


def _is_installed(file: str) -> bool:
    """Whether a file lies where packages are installed, also in folders that one environment borrows from another."""
    return file.startswith(_package_folders(tuple(sys.path)))


@functools.lru_cache(maxsize=8)
def _package_folders(path: tuple[str, ...]) -> tuple[str, ...]:
    named = [p for p in path if os.path.basename(os.path.normpath(p)) in ("site-packages", "dist-packages")]
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return tuple({os.path.normpath(p) + os.sep for p in (*named, *own)})


_STANDARD = sysconfig.get_path("stdlib") + os.sep


def is_versioned(file: str) -> bool:
    """Whether a file belongs to the standard library, torch or transformers, whose versions are part of every key."""
    if file.startswith(_libraries(sys.modules.get("transformers"))):
        return True
    return file.startswith((_STANDARD, "<frozen ")) and "site-packages" not in file


def _libraries(transformers: types.ModuleType | None) -> tuple[str, ...]:
    libraries = [torch] if transformers is None else [torch, transformers]
    return tuple(os.path.dirname(str(library.__file__)) + os.sep for library in libraries)
