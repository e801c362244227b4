"""Stacks of experts from quantized matrices: codes are merged as transformers merges floats, and stay codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from accelc.checkpoints.files import TensorFiles
from accelc.checkpoints.formats import Format
from accelc.checkpoints.plan import Stack
from accelc.ir.errors import CheckpointFormatError
from accelc.ir.quantized import QuantizedWeight


def read_stack(model: nn.Module, files: TensorFiles, form: Format, target: str, stack: Stack) -> QuantizedWeight:
    """The codes of a parameter that is a stack of matrices.

    Raises CheckpointFormatError for matrices of several schemes, with moved columns, or that are more than stacked.
    """
    if stack.merge is None:
        return form.matrix(stack.names[0], files.parts(stack.names[0]), *stack.shape[1:])[0]
    matrices = _one_scheme({name: _matrix(files, form, name, stack) for name in stack.names}, target)
    first = next(iter(matrices.values()))

    def merged(tensors: Mapping[str, Tensor]) -> Tensor:
        assert stack.merge is not None
        made = stack.merge.make(model, tensors.__getitem__)[target].contiguous()
        like, (count, rows, _) = next(iter(tensors.values())), stack.shape
        if made.shape != (count, len(like) * rows // stack.matrix[0], *like.shape[1:]):
            raise CheckpointFormatError(
                f"{target} is more than a stack of the quantized matrices {stack.names[0]} ...",
                remedy="Take the float model, which accelc.compile(path, quantize=...) quantizes itself.",
            )
        return made

    codes = merged({f"{name}.weight": matrix.codes for name, matrix in matrices.items()})
    scales = merged({f"{name}.weight": matrix.scales for name, matrix in matrices.items()})
    zeros = {f"{name}.weight": matrix.zeros for name, matrix in matrices.items() if matrix.zeros is not None}
    return QuantizedWeight(first.scheme, codes, scales, merged(zeros) if zeros else None, *stack.shape[1:])


def _matrix(files: TensorFiles, form: Format, name: str, stack: Stack) -> QuantizedWeight:
    weight, order = form.matrix(name, files.parts(name), *stack.matrix)
    if order is not None:
        raise CheckpointFormatError(
            f"{name} is an expert whose columns are moved (act-order), and experts are multiplied together",
            remedy="Take a checkpoint without desc_act, or the float model.",
        )
    return weight


def _one_scheme(matrices: dict[str, QuantizedWeight], target: str) -> dict[str, QuantizedWeight]:
    """The matrices in one scheme: with zeros of their own if any has them."""
    if any(matrix.zeros is not None for matrix in matrices.values()):
        matrices = {name: _with_zeros(matrix) for name, matrix in matrices.items()}
    schemes = {matrix.scheme for matrix in matrices.values()}
    if len(schemes) > 1:
        raise CheckpointFormatError(
            f"the experts of {target} are in several schemes: {', '.join(sorted(map(str, schemes)))}",
            remedy="Take a checkpoint with one scheme for the experts of a layer, or the float model.",
        )
    return matrices


def _with_zeros(matrix: QuantizedWeight) -> QuantizedWeight:
    if matrix.zeros is not None:
        return matrix
    zeros = torch.full_like(matrix.scales, matrix.scheme.middle)
    return replace(matrix, scheme=replace(matrix.scheme, symmetric=False), zeros=zeros)
