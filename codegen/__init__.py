"""Compiles step programs: our kernels and Inductor's on CPUs, Triton source for GPUs."""

from accelc.codegen.eager import register_kernels
from accelc.codegen.native import prepare
from accelc.codegen.options import Options, Report
from accelc.codegen.step import CompiledStep, compile_program, step_dims

register_kernels()

__all__ = ["CompiledStep", "Options", "Report", "compile_program", "prepare", "step_dims"]
