"""A transformers model without weights: every matrix on the meta device, and what is computed from the configuration,
such as rotary frequencies, in memory.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from accelc.ir.errors import CheckpointError, first_line


class UninitialisedOnMeta(TorchFunctionMode):
    """Within it `torch.empty` makes tensors on the meta device: layers allocate their weights by it, and it has no
    values that could be lost, unlike whatever else modules compute when they are made.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") in (None, "cpu", torch.device("cpu")):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def skeleton(path: Path, dtype: torch.dtype | None) -> nn.Module:
    """The causal language model that ``config.json`` in `path` describes, in evaluation mode, its weights on meta.

    `dtype` None takes the configuration's own, or float32. Parameters that transformers keeps in float32 are so here.
    Raises CheckpointError.
    """
    model = _described(path, dtype, UninitialisedOnMeta())
    _widen(model)
    return model.eval()  # type: ignore[no-any-return]


def outline(path: Path) -> nn.Module:
    """The same model without any values, for its names and shapes. Raises CheckpointError."""
    return _described(path, None, torch.device("meta"))  # type: ignore[no-any-return]


def _described(path: Path, dtype: torch.dtype | None, making: AbstractContextManager[Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers' own quantizers have no part in this
        with making:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever a wrong number in a configuration leads to
        raise CheckpointError(
            f"no model can be made of {path / 'config.json'}: {type(error).__name__}: {first_line(error)[:300]}",
            remedy="It must be the configuration of a causal language model that transformers knows.",
        ) from error
    try:
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:  # a broken JSON file is a ValueError
        raise CheckpointError(
            f"{path / 'generation_config.json'} cannot be read: {type(error).__name__}: {first_line(error)[:300]}",
            remedy="Repair it, or remove it: it has defaults of generating alone.",
        ) from error
    return model


def _widen(model: Any) -> None:
    """Let the parameters that transformers keeps in float32 (routers, some norms) have that dtype."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    for name, parameter in model.named_parameters():
        for pattern, dtype in plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                parameter.data = parameter.data.to(dtype)
