"""Checkpoints of GPTQ quantizers (AutoGPTQ, GPTQModel, optimum).

A linear [N, K] has, with b bits in words of 32,

* ``qweight`` int32 [K b / 32, N]: in a word the codes of neighbouring columns k of one row, lowest first,
* ``qzeros`` int32 [G, N b / 32]: zeros of neighbouring rows; what is stored is the zero minus one, modulo 2^b (so that
  0 is stored as 2^b - 1), unless ``checkpoint_format`` is "gptq_v2",
* ``scales`` [G, N], and ``g_idx`` int32 [K], the group of each column, which with ``desc_act`` are no neighbours.

Source: GPTQModel, gptqmodel/nn_modules/qlinear/__init__.py (`_register_gptq_buffers`, `dequantize_weight`) and
gptqmodel/utils/model.py (`convert_gptq_v1_to_v2_format_module`); settings in gptqmodel/quantization/config.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelc.checkpoints.formats import FLOATS, Expected, group_size, setting
from accelc.checkpoints.groups import Matrix, neighbours
from accelc.checkpoints.words import fields
from accelc.ir.errors import CheckpointFormatError
from accelc.ir.quantized import BITS, QuantizedWeight


@dataclass(frozen=True)
class Gptq:
    """``offset`` is what was taken from the zeros; ``overrides``: settings of single modules, by regular expression
    (GPTQModel's ``dynamic``).
    """

    bits: int
    group: int
    offset: int
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Gptq:
        """From ``quantization_config``. Raises CheckpointFormatError."""
        form = settings.get("checkpoint_format", settings.get("format", "gptq"))
        setting({"checkpoint_format": form}, "checkpoint_format", ("gptq", "gptq_v2"))
        setting(settings, "pack_dtype", ("int32",), "int32")
        overrides = settings.get("dynamic") or {}
        if not isinstance(overrides, dict) or not all(isinstance(own, dict) for own in overrides.values()):
            raise CheckpointFormatError("dynamic is no object of objects", where="quantization_config")
        for pattern in overrides:
            try:
                re.compile(pattern.removeprefix("+:").removeprefix("-:"))
            except re.error as error:
                raise CheckpointFormatError(f"dynamic has the pattern {pattern!r}: {error}",
                                            where="quantization_config") from error  # fmt: skip
        bits = setting(settings, "bits", BITS)
        return cls(bits, group_size(settings), 1 if form == "gptq" else 0, overrides)

    def expected(self, module: str, rows: int, columns: int) -> dict[str, Expected]:
        bits, group = self._of_module(module)
        per_word = 32 // bits
        if rows % per_word or columns % per_word:
            raise CheckpointFormatError(f"{module}: a matrix {[rows, columns]} does not fill words of {per_word} codes")
        groups = -(-columns // group) if group > 0 else 1
        return {
            "qweight": Expected((torch.int32,), ((columns // per_word, rows),)),
            "qzeros": Expected((torch.int32,), ((groups, rows // per_word),)),
            "scales": Expected(FLOATS, ((groups, rows),)),
            "g_idx": Expected((torch.int32, torch.int64), ((columns,),), optional=True),
            "bias": Expected(FLOATS, ((rows,),), optional=True),
        }

    def matrix(
        self, module: str, tensors: dict[str, Tensor], rows: int, columns: int
    ) -> tuple[QuantizedWeight, Tensor | None]:
        bits, group = self._of_module(module)
        codes = fields(tensors["qweight"], bits).permute(1, 0, 2).flatten(1)  # [K / 8, N, 8] to [N, K]
        zeros = fields(tensors["qzeros"], bits).flatten(1).T  # [N, G]
        zeros = (zeros + self.offset) & ((1 << bits) - 1)
        groups = tensors["g_idx"].long() if "g_idx" in tensors else neighbours(columns, group)
        count = tensors["scales"].shape[0]
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            raise CheckpointFormatError(f"{module}.g_idx names a group outside of the {count} there are")
        return Matrix(bits, codes, tensors["scales"].T, zeros, groups).stored(module)

    def _of_module(self, module: str) -> tuple[int, int]:
        """Bits and group size of one module: a pattern "-:..." leaves modules unquantized, others override."""
        for pattern, values in self.overrides.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                own = {"bits": self.bits, "group_size": self.group, **values}
                return setting(own, "bits", BITS), group_size(own)
        return self.bits, self.group
