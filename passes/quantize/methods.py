"""The methods by name: how a weight [..., N, K] and a scheme become a quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import InputError
from accelc.ir.quantized import QuantizedWeight, Scheme
from accelc.ir.rounding import all_finite, check_scales, round_to_nearest
from accelc.passes.quantize.calibration import Calibration, Rows, run_calibrated
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

    def made(matrix: Matrix, product: Product, pieces: Sequence[Rows]) -> QuantizedWeight:
        weight, scheme = matrix.weight(program), schemes[matrix.path]
        if not all(all_finite(piece.x) for piece in pieces):
            raise InputError(
                f"what enters the product with {matrix.path} holds NaN or infinite values on the calibration text",
                remedy="Look for the cause with the float model; fp16 overflows where bf16 does not.",
            )
        if pieces[0].ends is None:
            done[matrix.path] = gptq(weight, second_moment([piece.x for piece in pieces]), scheme)
        else:
            done[matrix.path] = _by_expert(weight, pieces, scheme)
        check_scales(matrix.path, done[matrix.path])
        return done[matrix.path]

    run_calibrated(program, matrices, text, made)
    return done


def second_moment(pieces: Sequence[Tensor]) -> Tensor:
    """mean(x x^T) [K, K] of the rows [M, K] of all pieces, in fp32."""
    columns = pieces[0].shape[-1]
    total = torch.zeros(columns, columns, dtype=torch.float32, device=pieces[0].device)
    for piece in pieces:
        rows = piece.float()
        total.addmm_(rows.T, rows)
    return total / max(sum(map(len, pieces)), 1)


def _by_expert(weight: Tensor, pieces: Sequence[Rows], scheme: Scheme) -> QuantizedWeight:
    """Each expert by its own rows; one that the text did not reach by all rows of the layer."""
    parts = []
    everyone = second_moment([piece.x for piece in pieces])
    for expert in range(len(weight)):
        own = [piece.of_expert(expert) for piece in pieces]
        enough = sum(map(len, own)) >= weight.shape[-1] // 4
        parts.append(gptq(weight[expert], second_moment(own) if enough else everyone, scheme))
    zeros = None if parts[0].zeros is None else torch.stack([p.zeros for p in parts])  # type: ignore[misc]
    codes, scales = torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts])
    return QuantizedWeight(scheme, codes, scales, zeros, parts[0].rows, parts[0].columns)
