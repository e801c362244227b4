"""The library of CPU kernels: built from codegen/cpu with the toolchain that Inductor uses, cached, called through
ctypes.

The source depends on no header of torch, so the build takes seconds, and `-march=native` is the run-time dispatch:
the cache key holds the processor's instruction set. ctypes releases the interpreter lock while a step runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelc.codegen.cache import cache_dir, cached, content_key
from accelc.codegen.errors import ToolchainError
from accelc.ir.compat import cpp_compiler

SOURCE = Path(__file__).parent / "cpu"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
]
# Not -ffast-math: it would fold the rounding trick of vexp away, and -inf is a value here.

_building = threading.Lock()


def source_text() -> str:
    """All of the kernels' source, in a fixed order: what the cache key is made from."""
    return "\n".join(f"// {p.name}\n{p.read_text()}" for p in sorted(SOURCE.iterdir()) if p.suffix in (".h", ".cpp"))


def prepare() -> None:
    """Load the kernels, and build them where the cache does not have them, beside the caller's work.

    `library` waits for it, and raises what went wrong.
    """

    def load() -> None:
        with contextlib.suppress(ToolchainError):  # `library` tries again and tells
            library()

    threading.Thread(target=load, name="accelc-kernels").start()


def library(march: str = "native") -> tuple[ctypes.CDLL, bool]:
    """The loaded kernels, and whether they came from the cache. Raises `ToolchainError`."""
    with _building:
        return _library(march)


@functools.cache
def _library(march: str) -> tuple[ctypes.CDLL, bool]:
    flags = [*FLAGS, f"-march={march}"]
    path = cache_dir() / "kernels" / f"{content_key(source_text(), ' '.join(flags))}.so"
    return cached(path, lambda scratch: _build(scratch, flags), _load)


def _build(target: Path, flags: list[str]) -> None:
    compiler = cpp_compiler()
    if compiler is None or shutil.which(compiler) is None:
        raise ToolchainError("No C++ compiler was found.", where=f"compiling {SOURCE.name}/kernels.cpp")
    units = sorted(SOURCE.glob("*.cpp"))
    objects = [target.with_name(f"{target.name}.{unit.stem}.o") for unit in units]
    compiling = [flag for flag in flags if flag != "-shared"]
    commands = [[compiler, *compiling, "-c", str(u), "-o", str(o)] for u, o in zip(units, objects)]
    try:
        with ThreadPoolExecutor(len(units)) as pool:  # a process each
            list(pool.map(_run, commands))
        _run([compiler, *flags, *map(str, objects), "-o", str(target)])
    finally:
        for path in objects:
            path.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ToolchainError(f"The C++ compiler failed:\n{done.stderr[-2000:]}", where=" ".join(command[:-2]))


def _load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))  # an OSError here means a damaged file
    try:
        lib.accelc_plan_create.restype = ctypes.c_void_p
        lib.accelc_plan_create.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        lib.accelc_plan_free.restype = None
        lib.accelc_plan_free.argtypes = [ctypes.c_void_p]
        lib.accelc_plan_clock.restype = None
        lib.accelc_plan_clock.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        lib.accelc_read.restype = ctypes.c_float
        lib.accelc_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
        lib.accelc_round.restype = None
        lib.accelc_round.argtypes = [
            ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32,
        ]  # fmt: skip
        lib.accelc_plan_run.restype = ctypes.c_int32
        lib.accelc_plan_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    except AttributeError as error:
        raise ValueError(f"not a kernel library: {error}") from error
    return lib
