"""The libraries of CPU kernels: built from codegen/cpu with the toolchain that Inductor uses, cached, called through
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
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelc.codegen.cache import cache_dir, cached, content_key, cpu_flags
from accelc.codegen.errors import ToolchainError
from accelc.codegen.instructions import OPS
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

_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


@dataclass(frozen=True, eq=False)
class Part:
    """A library: its source files, and the types of its functions, the result's first."""

    units: tuple[str, ...]
    functions: Mapping[str, tuple[Any, ...]]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self, path: Path) -> ctypes.CDLL:
        """The library at `path`. Raises OSError for a damaged file and ValueError for another library."""
        lib = ctypes.CDLL(str(path))
        try:
            for name, (result, *arguments) in self.functions.items():
                function = getattr(lib, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise ValueError(f"not a kernel library: {error}") from error
        return lib


KERNELS = Part(
    ("kernels", "linear"),
    {
        "accelc_kernel_set": (None, _I32, _P),
        "accelc_plan_create": (_P, _P, _I64),
        "accelc_plan_free": (None, _P),
        "accelc_plan_clock": (None, _P, _P),
        "accelc_plan_run": (_I32, _P, _P, _I64, _I64),
        "accelc_read": (ctypes.c_float, _P, _I64, _I32, _I32),
    },
)
QUANTIZED = Part(
    ("quantized", "rounding"),
    {
        "accelc_run_quantized_linear": (None, _P, _P),
        "accelc_round": (None, _P, _I32, _I64, _I64, _I64, _I64, _I32, _I32, _I32, _P, _I64, _P, _P, _P, _P, _I32),
    },
)
"""For weights in few bits. It takes as long to build as the other, and most programs do without."""


@dataclass(frozen=True)
class Library:
    """The loaded kernels."""

    kernels: ctypes.CDLL
    march: str
    cached: bool
    """They were built by an earlier process."""

    def plan(self, words: Any, operations: Collection[str], threads: int) -> int:
        """The handle of a plan of these operations, for a team of so many threads. Raises `ToolchainError`."""
        if "quantized_linear" in operations:
            quantized_library(self.march)
        handle: int = self.kernels.accelc_plan_create(words, threads)
        return handle


def source_text() -> str:
    """All of the kernels' source, in a fixed order: what the cache key is made from."""
    return "\n".join(f"// {p.name}\n{p.read_text()}" for p in sorted(SOURCE.iterdir()) if p.suffix in (".h", ".cpp"))


def prepare(*, quantized: bool = False) -> None:
    """Load the kernels, and build them where the cache does not have them, beside the caller's work.

    `library` and `quantized_library` wait for it, and raise what went wrong.
    """

    def load(needed: Callable[[], object]) -> None:
        with contextlib.suppress(ToolchainError):  # who needs it tries again and tells
            needed()

    for needed in (library, quantized_library) if quantized else (library,):
        threading.Thread(target=load, args=(needed,), name="accelc-kernels").start()


def library(march: str = "native") -> Library:
    """The kernels of all programs. Raises `ToolchainError`."""
    with KERNELS.lock:
        return _library(march)


def quantized_library(march: str = "native") -> ctypes.CDLL:
    """The kernels for weights in few bits, which those of all programs then know. Raises `ToolchainError`."""
    with QUANTIZED.lock:
        return _quantized_library(march)


@functools.cache
def _library(march: str) -> Library:
    kernels, hit = _built(KERNELS, march)
    return Library(kernels, march, hit)


@functools.cache
def _quantized_library(march: str) -> ctypes.CDLL:
    loaded, _ = _built(QUANTIZED, march)
    run = ctypes.cast(loaded.accelc_run_quantized_linear, ctypes.c_void_p)
    library(march).kernels.accelc_kernel_set(OPS.index("quantized_linear"), run)
    return loaded


def _built(part: Part, march: str) -> tuple[ctypes.CDLL, bool]:
    flags = [*FLAGS, f"-march={march}"]
    key = content_key(source_text(), " ".join((*part.units, *flags)))
    return cached(cache_dir() / "kernels" / f"{key}.so", lambda scratch: _build(scratch, part.units, flags), part.load)


def has_byte_products() -> bool:
    """Whether kernels for this processor multiply bytes (``ACCELC_DOT4`` in dot_codes.h)."""
    flags = cpu_flags().split()
    return "avx512_vnni" in flags or ("avx_vnni" in flags and "avx512f" not in flags)


def _build(target: Path, units: tuple[str, ...], flags: list[str]) -> None:
    compiler = cpp_compiler()
    if compiler is None or shutil.which(compiler) is None:
        raise ToolchainError("No C++ compiler was found.", where=f"compiling {SOURCE.name}/{units[0]}.cpp")
    objects = [target.with_name(f"{target.name}.{unit}.o") for unit in units]
    compiling = [flag for flag in flags if flag != "-shared"]
    commands = [[compiler, *compiling, "-c", str(SOURCE / f"{u}.cpp"), "-o", str(o)] for u, o in zip(units, objects)]
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
