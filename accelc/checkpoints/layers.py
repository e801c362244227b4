"""The layers of a model that have a form with a quantized weight, and putting tensors and modules into a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelc.ir.errors import CheckpointError
from accelc.ir.quantized import QuantizedWeight
from accelc.quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedModule


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """Rows N (outputs, or ids) and columns K of the weight that `module` multiplies by or looks up in; None for layers
    that compute something else, subclasses with a forward of their own included.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module).forward is nn.Linear.forward:
        return module.out_features, module.in_features  # type: ignore[return-value]
    if type(module).forward is Conv1D.forward:
        return module.nf, module.nx  # type: ignore[return-value]
    if type(module).forward is nn.Embedding.forward and module.max_norm is None:
        return module.num_embeddings, module.embedding_dim  # type: ignore[return-value]
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by its weight."""
    return matrix_shape(module) is not None and not isinstance(module, nn.Embedding)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a linear as [N, K]."""
    return weight if isinstance(module, nn.Linear) else weight.T


def quantized(
    module: nn.Module, weight: QuantizedWeight, bias: Tensor | None = None, order: Tensor | None = None
) -> QuantizedModule:
    """What takes the place of `module`, which `matrix_shape` knows."""
    if not isinstance(module, nn.Embedding):
        return QuantizedLinear(weight, bias, order)
    if order is not None:
        raise CheckpointError("an embedding cannot share a weight whose columns are moved (act-order)")
    return QuantizedEmbedding(weight, module.weight.dtype)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def assign(model: nn.Module, path: str, value: Tensor) -> None:
    """Replace a parameter or buffer; a parameter is kept as the object that it is."""
    parent, _, name = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if name in owner._buffers:
        owner._buffers[name] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[name] = value
    else:
        owner._parameters[name] = nn.Parameter(value, requires_grad=owner._parameters[name].requires_grad)


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """A copy of `value`, which may be mapped from a file, in the dtype of `like`."""
    return value.to(like.dtype, copy=True, memory_format=torch.contiguous_format)
