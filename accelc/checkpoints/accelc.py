"""accelc's own checkpoints: the tensors of `QuantizedWeight` as they are.

A linear or embedding [N, K] has ``codes``, ``scales``, ``zeros`` (asymmetric schemes) and ``order`` (moved columns) in
the layout of `accelc.ir.quantized`. ``quantization_config`` has ``schemes``, the scheme of each module by its name;
each file's metadata holds them again, as JSON, so that files and configuration cannot be mixed up. Of modules that
share their tensors, such as an embedding and a head, one is stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelc.checkpoints.files import TensorFiles
from accelc.checkpoints.formats import FLOATS, Expected, setting
from accelc.ir.errors import CheckpointError, CheckpointFormatError, InputError
from accelc.ir.quantized import LANES, QuantizedWeight, Scheme
from accelc.quantized_linear import STACK

VERSION = 1
SCHEMES = "accelc.schemes"
"""Key of the metadata."""


@dataclass(frozen=True)
class Accelc:
    """``schemes`` by module."""

    schemes: dict[str, Scheme]
    parts: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "order")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Accelc:
        """From ``quantization_config``. Raises CheckpointFormatError."""
        setting(settings, "version", (VERSION,))
        schemes = settings.get("schemes")
        if not isinstance(schemes, dict) or not all(isinstance(text, str) for text in schemes.values()):
            raise CheckpointFormatError("schemes must give the scheme of each module", where="quantization_config")
        try:
            return cls({module: Scheme.parse(text) for module, text in schemes.items()})
        except InputError as error:
            raise CheckpointFormatError(error.what, where="quantization_config", remedy=error.remedy) from error

    def settings(self) -> dict[str, Any]:
        """The ``quantization_config`` that `of` reads."""
        schemes = {module: str(scheme) for module, scheme in self.schemes.items()}
        return {"quant_method": "accelc", "version": VERSION, "schemes": schemes}

    def metadata(self) -> dict[str, str]:
        """Of each file."""
        return {"format": "pt", SCHEMES: json.dumps(self.settings()["schemes"], sort_keys=True)}

    def check_files(self, files: TensorFiles) -> None:
        """Raise CheckpointError when the files were written with other schemes, or hold floats in place of codes."""
        if SCHEMES not in files.metadata:
            raise CheckpointError(
                f"the headers of the files lack {SCHEMES!r}, the schemes that save_quantized wrote them with",
                remedy="Whoever wrote the files anew has to keep their metadata.",
            )
        if files.metadata[SCHEMES] != self.metadata()[SCHEMES]:
            raise CheckpointError("config.json names other quantization schemes than the files were written with")
        for module in self.schemes:
            name = module.removesuffix(STACK) if module.endswith(STACK) else f"{module}.weight"
            if name in files.entries:
                raise CheckpointError(f"{name} ({files.entries[name]}) is in place of the codes of {module}")

    def expected(self, module: str, rows: int, columns: int) -> dict[str, Expected]:
        scheme = self.schemes.get(module)
        if scheme is None:
            raise CheckpointFormatError(f"{module} is quantized but has no scheme", where="quantization_config")
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
