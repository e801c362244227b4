"""From a directory with float weights to the transformers model that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from accelc.checkpoints.accelc import holds_codes
from accelc.checkpoints.files import INDEX, TensorFiles
from accelc.checkpoints.plan import make_plan
from accelc.checkpoints.skeleton import outline
from accelc.ir.errors import CheckpointError, first_line


def load_floats(path: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers causal LM of directory `path`, in evaluation mode, every one of its weights from the files.

    transformers gives random values to weights that it does not find, converts integers, and leaves out what it has no
    place for; all of that is an error here. `dtype` default: that of the configuration or of the files.

    Raises CheckpointError, with every tensor that does not fit, before any is read.
    """
    files = float_files(path)
    make_plan(outline(path), files, None)
    if not (path / INDEX).is_file() and not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{path} has neither a model.safetensors nor {INDEX}", remedy="Get the index, or save the model anew."
        )
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"no model could be loaded from {path}: {type(error).__name__}: {first_line(error)}",
                              remedy="The directory must hold a valid config.json and all weights as safetensors."
                              ) from error  # fmt: skip
    if problems := _problems(found):
        raise CheckpointError(f"transformers did not load all weights of {path}: {problems}")
    return model.eval()  # type: ignore[no-any-return]


def float_files(path: Path) -> TensorFiles:
    """The files of a directory with float weights. Raises CheckpointError."""
    files = TensorFiles.of(path)
    if holds_codes(files):
        raise CheckpointError(
            f"the files in {path} hold quantized weights, and its config.json has no quantization_config",
            remedy="Copy the config.json that save_quantized wrote.",
        )
    return files


def _problems(found: dict[str, Any]) -> str:
    """What transformers says that it did not load, "" for nothing."""
    kinds = ("missing_keys", "mismatched_keys", "error_msgs", "conversion_errors")
    return "; ".join(f"{kind.replace('_', ' ')}: {found[kind]}" for kind in kinds if found.get(kind))
