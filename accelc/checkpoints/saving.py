"""Writing a model with quantized modules to a directory that loads as the same bytes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accelc.checkpoints.accelc import Accelc
from accelc.checkpoints.files import INDEX
from accelc.ir.errors import CheckpointError, InputError
from accelc.quantized_linear import QuantizedModule

SHARD = 4 << 30
"""Bytes of a file."""
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def save_quantized(
    model: nn.Module, directory: str | Path, *, source: str | Path | None = None, shard: int = SHARD
) -> None:
    """Write a transformers `model` with quantized modules: config.json with a ``quantization_config`` of method
    "accelc" (`accelc.checkpoints.accelc`), safetensors files of at most `shard` bytes, and the tokenizer files of
    `source`, default: the directory that the model came from.

    Files appear when all are written. Raises CheckpointError: no quantized module, no configuration, weights on the
    meta device, a file in the directory's place or a directory that holds weights already. InputError: scales in a
    dtype that no scheme has, a `shard` that is no number of bytes.
    """
    for name, given in (("directory", directory), ("source", source)):
        if not isinstance(given, str | Path) and not (name == "source" and given is None):
            raise InputError(f"{name} is {given!r}", remedy="Give the path of a directory.")
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}", remedy="Save what load_quantized returns.")
    if source is not None and not Path(source).is_dir():
        raise CheckpointError(
            f"there is no directory {source}", remedy="Give the one with the tokenizer, or leave it out."
        )
    path = Path(directory)
    if isinstance(shard, bool) or not isinstance(shard, int) or shard < 1:
        raise InputError(f"shard is {shard!r}", remedy="Give the bytes that a file may have, such as 4 << 30.")
    config: Any = getattr(model, "config", None)
    form = Accelc.of_model(model)
    if not form.schemes or not hasattr(config, "save_pretrained"):
        lacking = "no quantized module" if hasattr(config, "save_pretrained") else "no transformers configuration"
        raise CheckpointError(f"{type(model).__name__} has {lacking}", remedy="Save what load_quantized returns.")
    on_meta = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if on_meta:
        raise CheckpointError(f"{on_meta[0]} is on the meta device and has no values", remedy="Load the weights first.")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file", remedy="Give a new directory.")
    if any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} holds weights already", remedy="Give a new directory.")
    source = Path(source or getattr(config, "name_or_path", "") or path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write_all(model, form, path, source, shard)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}", remedy="Give a directory that can.") from error


def _write_all(model: nn.Module, form: Accelc, path: Path, source: Path, shard: int) -> None:
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as scratch:
        _write(model, form, Path(scratch), shard)
        for name in TOKENIZER:
            if (source / name).is_file() and not (path / name).exists():
                shutil.copyfile(source / name, Path(scratch, name))
        for file in sorted(Path(scratch).iterdir(), key=lambda f: f.name == "config.json"):  # that one last
            os.replace(file, path / file.name)


def _write(model: nn.Module, form: Accelc, folder: Path, shard: int) -> None:
    config: Any = copy.deepcopy(model.config)
    config.quantization_config = form.settings()
    config.architectures = [type(model).__name__]
    config.dtype = _dtype(model)
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    shards = _shards(model, shard)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(names) > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        save_file({key: t.detach().contiguous() for key, t in tensors.items()}, folder / name, form.metadata())
    if len(names) > 1:
        where = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
        index = {"metadata": {"total_size": sum(map(_bytes, shards))}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most parameters that are not quantized: `Module.half` does not tell the configuration."""
    quantized = {id(p) for m in model.modules() if isinstance(m, QuantizedModule) for p in m.parameters()}
    plain = Counter[torch.dtype]()
    for parameter in model.parameters():
        if id(parameter) not in quantized and parameter.is_floating_point():
            plain[parameter.dtype] += parameter.numel()
    return plain.most_common(1)[0][0] if plain else model.config.dtype  # type: ignore[no-any-return, union-attr]


def _shards(model: nn.Module, limit: int) -> list[dict[str, Tensor]]:
    """The tensors of a model in groups of at most `limit` bytes, or of one; of those that share memory the first."""
    shards: list[dict[str, Tensor]] = [{}]
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        if shards[-1] and _bytes(shards[-1]) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())
