"""The methods by name: how a weight [..., N, K] and a scheme become a quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from accelc.ir import Program
from accelc.ir.quantized import QuantizedWeight, Scheme
from accelc.ir.rounding import round_to_nearest
from accelc.passes.quantize.calibration import Calibration, run_calibrated
from accelc.passes.quantize.gptq import gptq
from accelc.passes.quantize.half_quadratic import half_quadratic
from accelc.passes.quantize.products import Matrix, Product

METHODS: dict[str, Callable[[Tensor, Scheme], QuantizedWeight]] = {
    "rtn": round_to_nearest,
    "hqq": half_quadratic,
}
"""What needs no data: rounding with a search of the range, and half-quadratic quantization."""
CALIBRATED = ("gptq", "awq")
"""What needs calibration text. "awq" rounds as "rtn" does, after scaling (`norm_scaling`)."""


def calibrated(
    program: Program, matrices: Mapping[str, Matrix], schemes: Mapping[str, Scheme], text: Calibration
) -> dict[str, QuantizedWeight]:
    """GPTQ for every matrix, each with the second moments of its own inputs (of each expert's, in stacks)."""
    done: dict[str, QuantizedWeight] = {}

    def made(matrix: Matrix, product: Product, x: Tensor, ends: Tensor | None) -> QuantizedWeight:
        weight, scheme = matrix.weight(program), schemes[matrix.path]
        if ends is None:
            done[matrix.path] = gptq(weight, second_moment(x), scheme)
        else:
            done[matrix.path] = _by_expert(weight, x, ends.tolist(), scheme)
        return done[matrix.path]

    run_calibrated(program, matrices, text, made)
    return done


def second_moment(x: Tensor) -> Tensor:
    """mean(x x^T) [K, K] of rows [M, K], in fp32."""
    rows = x.float()
    return rows.T @ rows / max(len(rows), 1)


def _by_expert(weight: Tensor, x: Tensor, ends: list[int], scheme: Scheme) -> QuantizedWeight:
    """Each expert by its own rows; one that the text did not reach by all rows of the layer."""
    parts, begin = [], 0
    everyone = second_moment(x)
    for expert, end in enumerate(ends):
        own = second_moment(x[begin:end]) if end - begin >= x.shape[-1] // 4 else everyone
        parts.append(gptq(weight[expert], own, scheme))
        begin = max(begin, end)
    zeros = None if parts[0].zeros is None else torch.stack([p.zeros for p in parts])  # type: ignore[misc]
    codes, scales = torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts])
    return QuantizedWeight(scheme, codes, scales, zeros, parts[0].rows, parts[0].columns)
