"""Quantizing a float model while it is loaded: no more of it is in memory at a time than one matrix."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from accelc.checkpoints.floats import float_files
from accelc.checkpoints.formats import quantization_of
from accelc.checkpoints.layers import as_matrix, fitted, is_linear, matrix_shape, put, quantized
from accelc.checkpoints.loading import load_rest, share
from accelc.checkpoints.plan import Plan, make_plan
from accelc.checkpoints.skeleton import skeleton
from accelc.ir.errors import CheckpointError, CheckpointFormatError, InputError, OptionValueError
from accelc.ir.quantized import Scheme
from accelc.ir.rounding import all_finite, check_scales
from accelc.passes.quantize.methods import CALIBRATED, METHODS
from accelc.passes.quantize.patterns import selected
from accelc.passes.quantize_weights import NONE, QuantizeWeights, head_scheme, is_automatic, parse_scheme
from accelc.quantized_linear import QuantizedModule

log = logging.getLogger(__name__)


def load_quantized(
    source: str | Path,
    scheme: str = "int4",
    *,
    head: str = "",
    method: str = "rtn",
    include: str = "*",
    exclude: str = "",
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> nn.Module:
    """The transformers causal LM of a directory with float safetensors weights, its linears quantized as they are read.

    The options mean what they do in `accelc.passes.quantize_weights.QuantizeWeights`: ``scheme`` of all linears but
    the head's, ``head`` ("": int8 with int4, else as the others), "none" for either that stays as it is, ``method``,
    and ``include`` and ``exclude``, patterns of weight names separated by commas. An embedding tied to the head reads
    its codes, unless it does more than look up. `dtype` is that of the parts that are not quantized, default: the
    configuration's. Stacks of experts stay floats, with a warning unless `quiet`, and chosen groups ("int4:auto") are
    not made: only a program tells how a stack is multiplied by, and what groups cost it. `accelc.compile(directory,
    quantize=...)` does both.

    Raises CheckpointError, CheckpointFormatError (it is quantized already), OptionValueError, InputError (scheme,
    weights that are not finite).
    """
    if not isinstance(source, str | Path):
        raise InputError(f"source is {source!r}", remedy="Give the path of a directory.")
    path = Path(source)
    QuantizeWeights(scheme, head=head, include=include, exclude=exclude).check_options()
    if quantization_of(path) is not None:
        raise CheckpointFormatError(f"the model in {path} is quantized already", remedy="Load it as it is.")
    if not isinstance(method, str) or method not in METHODS:
        remedy = f"Use one of: {', '.join(METHODS)}."
        if isinstance(method, str) and method in CALIBRATED:
            remedy += f" {method} needs text: accelc.compile(path, quantize=QuantizeWeights(...))."
        raise OptionValueError(f"no method {method!r} while a directory is read", remedy=remedy)
    schemes = {"body": _scheme(scheme), "head": _scheme(head_scheme(scheme, head))}
    files = float_files(path)
    model = skeleton(path, dtype)
    plan = make_plan(model, files, None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = _linears(model, plan)
    targets = selected(linears, include, exclude)
    if not targets or not any(schemes.values()):
        raise OptionValueError(
            "no weight is left to quantize",
            where=str(path),
            remedy=f"Check include and exclude; names are, for example: {', '.join(list(linears)[:4]) or 'none'}.",
        )
    for target in targets:
        module_path, tensor = linears[target]
        module = model.get_submodule(module_path)
        chosen = schemes["head" if module is output else "body"]
        if chosen is None:
            continue
        weight = as_matrix(module, files.read(tensor))
        if not all_finite(weight):
            raise CheckpointError(f"the weight {tensor} holds NaN or infinite values", remedy="Repair the checkpoint.")
        codes = METHODS[method](weight, chosen)
        check_scales(tensor, codes)
        bias_name = plan.plain.pop(f"{module_path}.bias", None)
        bias = None if bias_name is None else fitted(files.read(bias_name), module.bias)  # type: ignore[arg-type]
        made = quantized(module, codes, bias)
        put(model, module_path, made)
        _settle(model, plan, target, made)
    load_rest(model, files, plan)
    if not quiet and (stacks := _stacks(model)):
        log.warning(
            "%d stacks of matrices stay floats, the first: %s; accelc.compile(%r, quantize=...) quantizes them too",
            len(stacks), stacks[0], str(source),
        )  # fmt: skip
    return model


def _scheme(text: str) -> Scheme | None:
    """The scheme that a text means, None for none. Raises InputError, OptionValueError."""
    if text == NONE:
        return None
    if is_automatic(text):
        raise OptionValueError(
            f"{text!r} while a directory is read: groups are chosen where the whole program is known",
            remedy="Use accelc.compile(directory, quantize=...), or give a group.",
        )
    return parse_scheme(text)


def _stacks(model: nn.Module) -> list[str]:
    """Names of parameters that hold several float matrices."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, QuantizedModule)
        for name, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and value.is_floating_point()
    ]


def _linears(model: nn.Module, plan: Plan) -> dict[str, tuple[str, str]]:
    """Linears whose weight is one tensor of the files, by the weight's name: their path, and that tensor."""
    found = {}
    for path, module in model.named_modules():
        target = f"{path}.weight"
        tensor = plan.plain.get(target) or plan.plain.get(plan.tied.get(target, ""))
        if is_linear(module) and tensor is not None:
            found[target] = (path, tensor)
    return found


def _settle(model: nn.Module, plan: Plan, target: str, made: QuantizedModule) -> None:
    """Take the weight of a quantized module out of the plan; what is tied to it shares it, or is read for itself."""
    source = plan.tied.pop(target, target)
    group = [source, *(name for name, of in plan.tied.items() if of == source)]
    tensor = plan.plain[source]
    for name in group:
        if name == target:
            plan.plain.pop(name, None)
            continue
        plan.tied.pop(name, None)
        path = name.rpartition(".")[0]
        if matrix_shape(model.get_submodule(path)) is not None:
            plan.plain.pop(name, None)
            share(model, path, made)
        else:
            plan.plain[name] = tensor
