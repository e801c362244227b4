"""Mistakes that GPU kernels can meet."""

from __future__ import annotations

from accelc.ir.errors import CompileError, InputError


class KernelInputError(InputError):
    """A GPU kernel was called with operands that do not fit each other, or that it cannot read."""

    remedy = "See the docstring of accelc.codegen.gpu.quantized_gemm.quantized_gemm for shapes and dtypes."


class KernelConfigError(CompileError):
    """A tile configuration that the kernel cannot run with this weight."""

    remedy = "Take one of accelc.codegen.gpu.tuning.candidates(...)."


class CrossCompileError(CompileError):
    """A Triton kernel could not be compiled for a target; names both, Triton's own error is chained as __cause__."""

    remedy = "The target's name or the kernel is wrong: compile for sm_80, sm_90, sm_100 or gfx942 to tell."


class DisassemblyError(CompileError):
    """A compiled kernel could not be taken apart."""

    remedy = "nvdisasm and cuobjdump come with the triton package; reinstall it if they are missing."
