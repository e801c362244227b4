"""Compiles step programs: Inductor's C++ backend and packed kernels on CPUs, Triton source for GPUs."""
