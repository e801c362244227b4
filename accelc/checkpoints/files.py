"""The safetensors files of a directory as one table of tensors, of which each is read when it is asked for."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from accelc.ir.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""As safetensors' headers name them."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)} in {self.file.name}"


class TensorFiles:
    """``entries``: every tensor by name; ``metadata``: the strings that each file's header holds."""

    def __init__(self, entries: dict[str, Entry], metadata: dict[Path, dict[str, str]]) -> None:
        self.entries, self.metadata = entries, metadata

    @classmethod
    def of(cls, path: Path) -> TensorFiles:
        """Those in directory `path`: the ones its index lists, or all. Raises CheckpointError for missing, damaged or
        truncated files, and for a name in two of them.
        """
        if not path.is_dir():
            raise CheckpointError(f"there is no directory {path}", remedy="Give the directory of a saved model.")
        entries: dict[str, Entry] = {}
        metadata: dict[Path, dict[str, str]] = {}
        listed = _listed(path)
        for file in sorted({path / name for name in listed.values()}) if listed else sorted(path.glob("*.safetensors")):
            found, strings = _header(file)
            for name in found.keys() & entries.keys():
                raise CheckpointError(f"the tensor {name} is in {entries[name].file.name} and in {file.name}")
            entries |= found
            metadata[file] = strings
        if not entries:
            raise CheckpointError(
                f"no safetensors files in {path}", remedy="Give a directory with all weights as safetensors."
            )
        for name, file_name in listed.items():
            if name not in entries:
                raise CheckpointError(f"{INDEX} promises the tensor {name}, which is not there", where=file_name)
        return cls(entries, metadata)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, mapped from its file. The file is opened for it alone, so that its pages are given back
        when the tensor is.
        """
        entry = self.entries[name]
        try:
            with safe_open(str(entry.file), framework="pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the tensor {name} cannot be read: {error}", where=str(entry.file)) from error

    @functools.cached_property
    def modules(self) -> dict[str, set[str]]:
        """The last names of the tensors of each module, by its name."""
        found: dict[str, set[str]] = defaultdict(set)
        for name in self.entries:
            prefix, _, last = name.rpartition(".")
            found[prefix].add(last)
        return dict(found)

    def parts(self, module: str) -> dict[str, Tensor]:
        """The tensors of one module, by their last names."""
        return {last: self.read(f"{module}.{last}") for last in self.modules[module]}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}", where=str(file)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} holds no JSON object", where=str(file))
    return value


def _listed(path: Path) -> dict[str, str]:
    """File names by tensor, from the index; empty when there is none."""
    if not (path / INDEX).is_file():
        return {}
    found = read_json(path / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError("the index has no weight_map", where=str(path / INDEX))
    outside = [name for name in found.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"the index names a file outside of its directory: {outside[0]}", where=str(path / INDEX))
    return found


def _header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    entries = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"the tensor {name} is of type {part.get_dtype()}", where=str(file))
                entries[name] = Entry(file, tuple(part.get_shape()), dtype)
            return entries, dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file.name} is missing, truncated or no safetensors file: {error}", where=str(file)
        ) from error
