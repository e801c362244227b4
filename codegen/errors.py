"""Mistakes that compiling a step can meet."""

from __future__ import annotations

from accelc.ir.errors import AccelcError, CompileError


class ToolchainError(CompileError):
    """No usable C++ compiler."""

    remedy = (
        "Install g++ (Debian and Ubuntu: `apt install g++`) or point CXX at a compiler with C++17 and OpenMP; "
        "or run the program without compiled code: compile_program(..., options=Options(mode='interpret'))."
    )


class CacheDirectoryError(CompileError):
    """What is compiled has no place on disk, from where it is loaded."""

    remedy = "Set ACCELC_CACHE_DIR to a directory that can be written to, with some 100 MB free."


class RegionError(CompileError):
    """Inductor could not compile a region of the program; the region then runs node by node."""


class MutationError(CompileError):
    """A program writes to a tensor by something other than the dialect's updates."""

    remedy = "Functionalise the graph (torch.export's run_decompositions({})) before compiling it."


class StepInputError(AccelcError, ValueError):
    """A compiled step was called with inputs that it was not compiled for."""


class StepIndexError(AccelcError, IndexError):
    """A compiled step met an index outside its table, or a cache without room for the new tokens."""


class ShapeError(CompileError):
    """A shape in the program cannot be told from the shapes of its inputs."""
