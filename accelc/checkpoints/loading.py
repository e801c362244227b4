"""From a directory with quantized weights to a model that computes with them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from accelc.checkpoints.files import TensorFiles
from accelc.checkpoints.formats import format_of, quantization_of
from accelc.checkpoints.layers import assign, fitted, put, quantized
from accelc.checkpoints.plan import Plan, make_plan
from accelc.checkpoints.skeleton import skeleton
from accelc.checkpoints.stacks import read_stack
from accelc.ir.errors import CheckpointError, CheckpointFormatError
from accelc.ir.quantized import QuantizedWeight
from accelc.ir.rounding import all_finite
from accelc.quantized_linear import QuantizedModule, QuantizedStack, put_stack

log = logging.getLogger(__name__)


def load_checkpoint(source: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers causal LM of a directory with quantized weights, its quantized linears as `QuantizedLinear`
    and its stacks of experts as `QuantizedStack`.

    Read are the methods of `accelc.checkpoints.formats.METHODS`. Codes, scales and zeros stay as they are: nothing is
    dequantized or rounded, and one matrix is worked on at a time. `dtype` is that of the parts that are not quantized,
    default: the configuration's.

    Raises CheckpointError, with every tensor that does not fit, before any is read; CheckpointFormatError.
    """
    path = Path(source)
    settings = quantization_of(path)
    if settings is None:
        raise CheckpointFormatError(f"the model in {path} is not quantized", remedy="Use load_quantized for it.")
    files = TensorFiles.of(path)
    form = format_of(settings, files)
    model = skeleton(path, dtype)
    plan = make_plan(model, files, form)
    for path_in_model, name in plan.quantized.items():
        module = model.get_submodule(path_in_model)
        rows, columns = _shape(module)
        tensors = files.parts(name)
        bias = tensors.pop("bias", None)
        weight, order = form.matrix(name, tensors, rows, columns)
        check_read(name, weight)
        bias = _bias(name, module, bias)
        put(model, path_in_model, quantized(module, weight, bias, order))
    for target, stack in plan.stacks.items():
        owner, _, last = target.rpartition(".")
        module = model.get_submodule(owner)
        dtype = module.get_parameter(last).dtype
        weight = read_stack(model, files, form, target, stack)
        check_read(target, weight)
        put_stack(module, last, QuantizedStack(weight, dtype))
    load_rest(model, files, plan)
    log.info("%d linears and %d stacks of %s are quantized", len(plan.quantized), len(plan.stacks), path)
    return model


def _bias(name: str, module: nn.Module, bias: Tensor | None) -> Tensor | None:
    """The bias of a quantized module. Quantizers write zeros for a layer without one, which are left out; raises
    CheckpointError for others.
    """
    if bias is None:
        return None
    if getattr(module, "bias", None) is None and not isinstance(module, nn.Embedding):
        if bool((bias != 0).any()):
            raise CheckpointError(f"{name}.bias is unexpected: the model's layer has none, and this one is not zero")
        return None
    return finite(f"{name}.bias", fitted(bias, module.weight))  # type: ignore[arg-type]


def check_read(name: str, weight: QuantizedWeight) -> None:
    """Raise CheckpointError for scales or zeros that are not finite."""
    for part, value in (("scales", weight.scales), ("zeros", weight.zeros)):
        if value is not None and not all_finite(value):
            raise CheckpointError(f"the {part} of {name} hold NaN or infinite values", remedy="Repair the checkpoint.")


def load_rest(model: nn.Module, files: TensorFiles, plan: Plan) -> None:
    """Read what is not quantized, and tie what is tied: a partner of a quantized module shares its codes."""
    state = dict(model.state_dict())
    for target, name in plan.plain.items():
        assign(model, target, finite(name, fitted(files.read(name), state[target])))
    for merge in plan.merges.values():
        for target, value in merge.make(model, files.read).items():
            assign(model, target, finite(target, fitted(value, state[target])))
    for target, source in plan.tied.items():
        path, owner = target.rpartition(".")[0], model.get_submodule(source.rpartition(".")[0])
        if isinstance(owner, QuantizedModule):
            share(model, path, owner)
        else:
            assign(model, target, owner.get_parameter(source.rpartition(".")[2]))
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if left:
        raise CheckpointError(f"nothing gives the values of {left[0]}", remedy="Load the float model instead.")


def finite(name: str, value: Tensor) -> Tensor:
    """`value` itself. Raises CheckpointError for a weight that holds NaN or infinite values in its dtype."""
    if value.is_floating_point() and value.dim() and not all_finite(value):
        raise CheckpointError(
            f"{name} holds NaN or infinite values in {str(value.dtype).removeprefix('torch.')}",
            remedy="Repair the checkpoint, or load it in a dtype of a larger range.",
        )
    return value


def share(model: nn.Module, path: str, owner: QuantizedModule) -> None:
    """Let the module at `path` read the quantized weight of `owner`, to which it is tied."""
    module = model.get_submodule(path)
    if _shape(module) != (owner.rows, owner.columns):
        raise CheckpointError(f"{path} is tied to a quantized weight [{owner.rows}, {owner.columns}] of another shape")
    bias = getattr(module, "bias", None)
    put(model, path, quantized(module, owner.weight_value(), bias, getattr(owner, "order", None)))


def _shape(module: nn.Module) -> tuple[int, int]:
    from accelc.checkpoints.layers import matrix_shape

    shape = matrix_shape(module)
    if shape is None:
        raise CheckpointError(f"a {type(module).__name__} cannot read a quantized weight")
    return shape
