"""Compiles step programs: our kernels and Inductor's on CPUs, Triton source for GPUs."""

from accelc.codegen.eager import register_kernels
from accelc.codegen.gpu.register import register as register_gpu_kernels
from accelc.codegen.native import prepare
from accelc.codegen.options import Options, Report
from accelc.codegen.step import CompiledStep, compile_program, step_dims

register_kernels()
register_gpu_kernels()  # imports Triton at the first use

__all__ = ["CompiledStep", "Options", "Report", "compile_program", "prepare", "step_dims"]
