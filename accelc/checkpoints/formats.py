"""The formats of quantized checkpoints, by the ``quant_method`` of their configuration; one file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from accelc.checkpoints.files import Entry, TensorFiles, read_json
from accelc.ir.errors import CheckpointFormatError
from accelc.ir.quantized import QuantizedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Expected:
    """What one tensor of a quantized matrix must be: one of ``dtypes``, and one of ``shapes`` (none: any)."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False

    def stacked(self, count: int) -> Expected:
        """Of so many matrices in one tensor."""
        return replace(self, shapes=tuple((count, *shape) for shape in self.shapes))

    def fits(self, entry: Entry) -> bool:
        return entry.dtype in self.dtypes and (entry.shape in self.shapes or not self.shapes)

    def __str__(self) -> str:
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{dtypes} {' or '.join(str(list(shape)) for shape in self.shapes)}"


class Format(Protocol):
    """How quantized matrices lie in the tensors of a checkpoint."""

    parts: ClassVar[tuple[str, ...]]
    """Last names by which a module is known to be quantized."""

    def expected(self, module: str, rows: int, columns: int) -> dict[str, Expected]:
        """The tensors of the matrix [N, K] of `module` by their last name. Raises CheckpointFormatError."""
        ...

    def matrix(
        self, module: str, tensors: dict[str, Tensor], rows: int, columns: int
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """The matrix [N, K] of checked `tensors` (by last name), and the order of its columns where they are moved
        (`Matrix.stored`). Raises CheckpointFormatError.
        """
        ...


def quantization_of(path: Path) -> dict[str, Any] | None:
    """The quantization settings of the model in directory `path`, None when it is not quantized.

    They are in config.json (``quantization_config``, in older files ``compression_config``); checkpoints from before
    that have a file of their own: quantize_config.json of AutoGPTQ, quant_config.json of AutoAWQ. Raises
    CheckpointError.
    """
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        for owner in (config, config.get("text_config")):
            for key in ("quantization_config", "compression_config"):
                found = owner.get(key) if isinstance(owner, dict) else None
                if found is not None and not isinstance(found, dict):
                    raise CheckpointFormatError(f"{key} is {found!r}, no object", where=str(path / "config.json"))
                if found:
                    return {"quant_method": "compressed-tensors", **found} if key != "quantization_config" else found
    if (path / "quantize_config.json").is_file():
        return {"quant_method": "gptq", **read_json(path / "quantize_config.json")}
    if (path / "quant_config.json").is_file():
        old = read_json(path / "quant_config.json")
        names = {"w_bit": "bits", "q_group_size": "group_size"}
        return {"quant_method": "awq", **{names.get(key, key): value for key, value in old.items()}}
    return None


def format_of(settings: dict[str, Any], files: TensorFiles) -> Format:
    """The format that quantization settings name. Raises CheckpointFormatError, and CheckpointError when `files` do not
    belong to them.
    """
    method = settings.get("quant_method")
    found = METHODS.get(method) if isinstance(method, str) else None
    if found is None:
        raise CheckpointFormatError(
            f"quant_method is {method!r}",
            where="quantization_config",
            remedy=f"Known methods: {', '.join(METHODS)}. Or take the float model, which accelc quantizes itself.",
        )
    return found(settings, files)


def setting(settings: dict[str, Any], name: str, known: tuple[Any, ...], default: Any = None) -> Any:
    """The value of one setting, which must be among `known`. Raises CheckpointFormatError."""
    value = settings.get(name, default)
    if value not in known:
        raise CheckpointFormatError(
            f"{name} is {value!r}",
            where="quantization_config",
            remedy=f"Known: {', '.join(map(repr, known))}. Take a checkpoint with one of these, or the float model.",
        )
    return value


def group_size(settings: dict[str, Any]) -> int:
    """The setting ``group_size``: columns, or -1 for the whole row. Raises CheckpointFormatError."""
    size = settings.get("group_size", 128)
    if not isinstance(size, int) or isinstance(size, bool) or (size <= 0 and size != -1):
        raise CheckpointFormatError(f"group_size is {size!r}", where="quantization_config",
                                    remedy="It must be a number of columns, or -1 for the whole row.")  # fmt: skip
    return size


def _gptq(settings: dict[str, Any], files: TensorFiles) -> Format:
    from accelc.checkpoints.gptq import Gptq

    return Gptq.of(settings)


def _awq(settings: dict[str, Any], files: TensorFiles) -> Format:
    from accelc.checkpoints.awq import Awq

    return Awq.of(settings)


def _compressed_tensors(settings: dict[str, Any], files: TensorFiles) -> Format:
    from accelc.checkpoints.compressed_tensors import CompressedTensors

    return CompressedTensors.of(settings)


def _accelc(settings: dict[str, Any], files: TensorFiles) -> Format:
    from accelc.checkpoints.accelc import Accelc

    return Accelc.of(settings, files)


METHODS: dict[str, Callable[[dict[str, Any], TensorFiles], Format]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "accelc": _accelc,
}
