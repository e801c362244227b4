"""Checks of the arguments of `accelc.compile`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

from accelc.ir import Exactness
from accelc.ir.errors import InputError
from accelc.passes import Pass
from accelc.runtime.arguments import token_ids


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise InputError unless a value is one of those that a `Literal` lists."""
    if value not in get_args(choices):
        raise InputError(f"{name} is {value!r}", remedy=f"Use one of: {', '.join(map(repr, get_args(choices)))}.")


def check_output(path: Path, *, plot: bool = False) -> None:
    """Raise InputError where no file can be written, before the work that ends with it; `plot`: one in SVG goes next to
    it.
    """
    if plot and path.suffix == ".svg":
        raise InputError(f"{path} is where the plot goes", remedy="Give another ending, such as .json.")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"no file can be written as {path}", remedy="Give a file in a folder that exists.")


def check_types(
    max_length: object,
    max_batch: object,
    chunk: object,
    passes: Any,
    disable: object,
    require: object,
    eos: object = None,
    progress: object = None,
) -> None:
    """Raise InputError for options of a wrong type, with what they should be."""
    for name, value, least in (("max_length", max_length, 2), ("max_batch", max_batch, 1), ("chunk", chunk, 1)):
        if value is None and name != "chunk":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}", remedy=f"Use an integer of at least {least}.")
    token_ids("eos", eos)
    if progress is not None and not callable(progress):
        raise InputError(f"progress is {progress!r}", remedy="Pass a function of a stage's name: progress=print.")
    if isinstance(disable, str) or not isinstance(disable, Collection) or not all(isinstance(n, str) for n in disable):
        shown = repr(disable) if isinstance(disable, str) else '"raise_norms"'
        raise InputError(f"disable is {disable!r}", remedy=f"Pass a list of names: disable=[{shown}].")
    if not isinstance(require, Exactness):
        raise InputError(f"require is {require!r}", remedy="Use accelc.Exactness.EXACT, DISTRIBUTION or LOSSY.")
    if not isinstance(passes, Sequence) or not all(isinstance(p, Pass) for p in passes):
        raise InputError(f"passes is {passes!r}", remedy="Pass a list of instances, for example passes=[MyPass()].")
