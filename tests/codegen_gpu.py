"""For tests of the GPU kernels: Triton's interpreter (on CPUs, in numpy), and random weights in few bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import triton

from accelc.codegen.gpu import kernels, quantized_gemm
from accelc.ir.quantized import QuantizedWeight, Scheme


def interpreted_kernels(module: ModuleType = kernels) -> ModuleType:
    """A second copy of a module of kernels whose functions are interpreted.

    `triton.jit` looks at TRITON_INTERPRET when it decorates a function: the copy is made with it, and nothing else in
    this process sees it. Skips where Triton 3.6 meets a numpy whose arrays of one element are no numbers any more: its
    interpreter takes the bounds of loops from such arrays.
    """
    if version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4):
        pytest.skip(f"Triton {triton.__version__} interprets no loops with numpy {numpy.__version__}")
    spec = importlib.util.spec_from_file_location(f"accelc_interpreted_{module.__name__}", str(module.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


def version(text: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in text.split(".")[:2])


@contextmanager
def interpreter(module: ModuleType, launches: ModuleType = quantized_gemm) -> Iterator[None]:
    """Launches by another module go to `module` inside of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(launches, "kernels", module)
        yield


def interpreted_launches(*pairs: tuple[ModuleType, ModuleType]) -> Any:
    """A fixture for the tests of a module: (kernels, what launches them), each interpreted."""

    @pytest.fixture(scope="module", autouse=True)
    def interpreted() -> Iterator[None]:
        with ExitStack() as stack:
            for module, launches in pairs:
                stack.enter_context(interpreter(interpreted_kernels(module), launches))
            yield

    return interpreted


def random_weight(scheme: Scheme, rows: int, columns: int, seed: int, *leading: int) -> QuantizedWeight:
    """A weight [*leading, rows, columns] of random codes, scales in [0.5, 1.5) / levels and fractional zeros."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.levels, (*leading, rows, scheme.padded(columns)), generator=g, dtype=torch.uint8)
    groups = (*leading, rows, scheme.groups(columns))
    scales = (0.5 + torch.rand(groups, generator=g)) / scheme.levels
    zeros = None if scheme.symmetric else torch.rand(groups, generator=g) * scheme.levels
    return QuantizedWeight.of(scheme, codes, scales, zeros, columns)
