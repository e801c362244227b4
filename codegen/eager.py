"""The kernels for weights in few bits, and for making them, as CPU implementations of their operations.

A model whose modules hold quantized weights runs eagerly, and is captured, checked and calibrated, by these operations;
their reference dequantizes the whole weight at each call. Importing `accelc.codegen` registers the kernels; what they
do not take (no compiler, unusual layouts) goes to the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.fx as fx
from torch import Tensor

from accelc.codegen.arrays import CODES, FLOATS
from accelc.codegen.errors import ToolchainError
from accelc.codegen.native import quantized_library
from accelc.codegen.options import Options
from accelc.codegen.step import CompiledStep
from accelc.ir.quantized import Scheme
from accelc.ir.quantized_ops import quantized_linear, quantized_linear_reference
from accelc.ir.rounding import empty_codes, round_weight, round_weight_reference

Form = tuple[torch.dtype, torch.Size, torch.Size, torch.dtype, bool, torch.dtype | None, int, int, int]
"""All but the number of rows that a kernel's plan depends on."""


def register_kernels() -> None:
    """Make the kernels what `accelc::quantized_linear` (and so products of stacks) and `accelc::round_weight` run on
    CPU tensors.
    """
    quantized_linear.register_kernel("cpu")(linear)
    round_weight.register_kernel("cpu")(rounded)


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, rows: int
) -> Tensor:
    """`accelc::quantized_linear` by the kernel of compiled steps."""
    plain = codes.dim() == 3 and all(t is None or t.is_contiguous() for t in (codes, scales, zeros, bias))
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if not plain or not len(flat) or not x.dtype.is_floating_point or x.dtype is torch.float64:
        return quantized_linear_reference(x, codes, scales, zeros, bias, bits, rows)
    bias_dtype = None if bias is None else bias.dtype
    form = (x.dtype, codes.shape, scales.shape, scales.dtype, zeros is not None, bias_dtype, bits, rows, x.shape[-1])
    try:
        step = _step(form, torch.get_num_threads())
    except ToolchainError:  # `accelc doctor` and `accelc.compile` report it
        return quantized_linear_reference(x, codes, scales, zeros, bias, bits, rows)
    tensors = [t.detach() for t in (flat, codes, scales, zeros, bias) if t is not None]
    return step(*tensors)[0].reshape(*x.shape[:-1], rows)


@functools.lru_cache(maxsize=64)
def _step(form: Form, threads: int) -> CompiledStep:
    """The product as a program of one operation, for any number of rows."""
    dtype, codes, scales, scale_dtype, has_zeros, bias_dtype, bits, rows, columns = form
    graph = fx.Graph()
    examples = {
        "x": torch.empty(1, columns, dtype=dtype, device="meta"),
        "codes": torch.empty(codes, dtype=torch.uint8, device="meta"),
        "scales": torch.empty(scales, dtype=scale_dtype, device="meta"),
    }
    if has_zeros:
        examples["zeros"] = torch.empty(scales, dtype=scale_dtype, device="meta")
    if bias_dtype is not None:
        examples["bias"] = torch.empty(rows, dtype=bias_dtype, device="meta")
    nodes = {name: graph.placeholder(name) for name in examples}
    arguments = [nodes.get(name) for name in ("x", "codes", "scales", "zeros", "bias")]
    graph.output((graph.call_function(torch.ops.accelc.quantized_linear.default, (*arguments, bits, rows)),))
    module = fx.GraphModule(torch.nn.Module(), graph)
    options = Options(threads=threads, huge_pages=False)
    return CompiledStep(module, list(examples.values()), {"x": {0: "M"}}, options)


def rounded(
    weight: Tensor, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype, shrink: Sequence[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`accelc::round_weight` by the kernel, a matrix of a stack at a time."""
    given = (weight, bits, group, symmetric, scale_dtype, shrink, importance)
    if weight.dtype not in FLOATS or not weight.numel():
        return round_weight_reference(*given)
    try:
        kernels = quantized_library()
    except ToolchainError:
        return round_weight_reference(*given)
    scheme = Scheme(bits, group, symmetric, scale_dtype)
    *_, rows, columns = weight.shape
    made = empty_codes(weight, scheme)
    padded = scheme.padded(columns)
    counts = None if importance is None else torch.nn.functional.pad(importance.float(), (0, padded - columns))
    tries = torch.tensor(shrink, dtype=torch.float64)
    matrices = [weight] if weight.dim() == 2 else weight.reshape(-1, rows, columns)
    outputs = [t.view(len(matrices), -1) if t.numel() else t.new_empty(len(matrices), 0) for t in made]
    for index, matrix in enumerate(matrices):
        matrix = matrix.contiguous()  # one that is stored turned is copied, one at a time
        kernels.accelc_round(
            matrix.data_ptr(), CODES[weight.dtype], rows, columns, padded, group or padded, bits, int(symmetric),
            CODES[scale_dtype], tries.data_ptr(), len(shrink), None if counts is None else counts.data_ptr(),
            *(out[index].data_ptr() for out in outputs), torch.get_num_threads(),
        )  # fmt: skip
    return made
