"""accelc's own checkpoints: the tensors of `QuantizedWeight` as they are.

A linear or embedding [N, K] has ``codes``, ``scales``, ``zeros`` (asymmetric schemes) and ``order`` (moved columns) in
the layout of `accelc.ir.quantized`. ``quantization_config`` has ``schemes``, the scheme of each module by its name;
each file's metadata holds them again, as JSON, with the shapes and tensors of the modules, so that files and
configuration cannot be mixed up: the padding of rows would hide a wrong size. Of modules that share their tensors, such
as an embedding and a head, one is stored.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accelc.checkpoints.files import TensorFiles
from accelc.checkpoints.formats import FLOATS, Expected, setting
from accelc.ir.errors import CheckpointError, CheckpointFormatError, InputError
from accelc.ir.quantized import LANES, QuantizedWeight, Scheme
from accelc.quantized_linear import STACK, QuantizedModule

VERSION = 1
MODULES = "accelc.modules"
"""Key of the metadata."""


@dataclass(frozen=True)
class Stored:
    """What was written of one module: ``shape`` of its weight, and the last names of its tensors, none where they are
    another module's.
    """

    scheme: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Accelc:
    """``schemes`` by module, and what the files were written with."""

    schemes: dict[str, Scheme]
    stored: dict[str, Stored]
    parts: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "order")

    @classmethod
    def of(cls, settings: dict[str, Any], files: TensorFiles) -> Accelc:
        """From ``quantization_config`` and the metadata of the files. Raises CheckpointFormatError, and CheckpointError
        when the files were written with other schemes, or changed since.
        """
        setting(settings, "version", (VERSION,))
        schemes = settings.get("schemes")
        if not isinstance(schemes, dict) or not all(isinstance(text, str) for text in schemes.values()):
            raise CheckpointFormatError("schemes must give the scheme of each module", where="quantization_config")
        try:
            parsed = {module: Scheme.parse(text) for module, text in schemes.items()}
        except InputError as error:
            raise CheckpointFormatError(error.what, where="quantization_config", remedy=error.remedy) from error
        made = cls(parsed, _stored(files))
        made.check_files(files)
        return made

    @classmethod
    def of_model(cls, model: nn.Module) -> Accelc:
        """Of the quantized modules of a model. Raises InputError for scales in a dtype that no scheme has."""
        modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
        schemes = {name: module.stored_scheme() for name, module in modules.items()}
        stored, written = {}, set[int]()
        for name, module in modules.items():
            parts = {last: tensor.data_ptr() for last, tensor in module.state_dict().items()}
            own = sorted(last for last, place in parts.items() if place not in written)
            written.update(parts.values())
            stored[name] = Stored(str(schemes[name]), module.weight_value().shape, tuple(own))
        return cls(schemes, stored)

    def settings(self) -> dict[str, Any]:
        """The ``quantization_config`` that `of` reads."""
        schemes = {module: str(scheme) for module, scheme in self.schemes.items()}
        return {"quant_method": "accelc", "version": VERSION, "schemes": schemes}

    def metadata(self) -> dict[str, str]:
        """Of each file."""
        return {"format": "pt", MODULES: json.dumps({m: asdict(one) for m, one in self.stored.items()}, sort_keys=True)}

    def check_files(self, files: TensorFiles) -> None:
        """Raise CheckpointError when the files are not those that were written with these schemes."""
        if {module: one.scheme for module, one in self.stored.items()} != self.settings()["schemes"]:
            raise CheckpointError("config.json names other quantization schemes than the files were written with")
        for module, one in self.stored.items():
            name = module.removesuffix(STACK) if module.endswith(STACK) else f"{module}.weight"
            if name in files.entries:
                raise CheckpointError(f"{name} ({files.entries[name]}) is in place of the codes of {module}")
            found = files.modules.get(module, set())
            if found != set(one.parts):
                lacking, extra = sorted(set(one.parts) - found), sorted(found - set(one.parts))
                what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(extra)} besides"
                raise CheckpointError(f"{module} {what}: save_quantized wrote {', '.join(one.parts) or 'nothing'}")

    def expected(self, module: str, rows: int, columns: int) -> dict[str, Expected]:
        scheme = self.schemes.get(module)
        if scheme is None:
            raise CheckpointFormatError(f"{module} is quantized but has no scheme", where="quantization_config")
        if self.stored[module].shape[-2:] != (rows, columns):
            saved = list(self.stored[module].shape[-2:])
            raise CheckpointError(f"{module} was saved as a matrix {saved}, and config.json wants {[rows, columns]}")
        parts, words = -(-rows // LANES), scheme.padded(columns) * scheme.bits // 32
        scales = Expected((scheme.scale_dtype,), ((parts, scheme.groups(columns), LANES),))
        return {
            "codes": Expected((torch.uint8,), ((parts, words, 4 * LANES),)),
            "scales": scales,
            **({} if scheme.symmetric else {"zeros": scales}),
            "order": Expected((torch.int64,), ((columns,),), optional=True),
            "bias": Expected(FLOATS, ((rows,),), optional=True),
        }

    def matrix(
        self, module: str, tensors: dict[str, Tensor], rows: int, columns: int
    ) -> tuple[QuantizedWeight, Tensor | None]:
        order = tensors["order"].clone() if "order" in tensors else None
        if order is not None and not torch.equal(order.sort().values, torch.arange(columns)):
            raise CheckpointError(f"{module}.order is no permutation of {columns} columns")
        codes, scales = tensors["codes"].clone(), tensors["scales"].clone()
        zeros = tensors["zeros"].clone() if "zeros" in tensors else None
        return QuantizedWeight(self.schemes[module], codes, scales, zeros, rows, columns), order


def holds_codes(files: TensorFiles) -> bool:
    """Whether `save_quantized` wrote the files."""
    return any(MODULES in strings for strings in files.metadata.values())


def _stored(files: TensorFiles) -> dict[str, Stored]:
    """What the headers of the files say of the modules. Raises CheckpointError."""
    found = {strings.get(MODULES): file for file, strings in files.metadata.items()}
    if None in found:
        raise CheckpointError(
            f"the header of {found[None].name} lacks {MODULES!r}, what save_quantized wrote it with",
            remedy="Whoever wrote the file anew has to keep its metadata.",
        )
    if len(found) > 1:
        names = " and ".join(file.name for file in list(found.values())[:2])
        raise CheckpointError(f"{names} are not of one model: their headers differ")
    [text] = found
    try:
        return {
            module: Stored(str(one["scheme"]), tuple(map(int, one["shape"])), tuple(map(str, one["parts"])))
            for module, one in json.loads(str(text)).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the headers of the files have a damaged {MODULES!r}: {error}") from error
