"""Checkpoints of AutoAWQ in its "gemm" packing.

A linear [N, K] has ``qweight`` int32 [K, N / 8] and ``qzeros`` int32 [G, N / 8], both with the codes of eight
neighbouring rows n in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on, and ``scales`` [G, N]. Zeros are
stored as they are.

Source: AutoAWQ, awq/modules/linear/gemm.py (`WQLinear_GEMM.from_linear`) and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelc.checkpoints.formats import FLOATS, Expected, group_size, setting
from accelc.checkpoints.groups import Matrix, neighbours
from accelc.checkpoints.words import fields
from accelc.ir.errors import CheckpointFormatError
from accelc.ir.quantized import QuantizedWeight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Row within eight of each field of a word."""
PLACE = tuple(ORDER.index(row) for row in range(8))
"""Field of each row."""


@dataclass(frozen=True)
class Awq:
    """``group``: columns that share a scale; -1: all."""

    group: int
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Awq:
        """From ``quantization_config``. Raises CheckpointFormatError."""
        setting(settings, "bits", (4,), 4)
        version = settings.get("version", "gemm")
        setting({"version": version.lower() if isinstance(version, str) else version}, "version", ("gemm",))
        return cls(group_size(settings))

    def expected(self, module: str, rows: int, columns: int) -> dict[str, Expected]:
        if rows % 8:
            raise CheckpointFormatError(f"{module}: {rows} rows do not fill words of 8 codes")
        groups = -(-columns // self.group) if self.group > 0 else 1
        return {
            "qweight": Expected((torch.int32,), ((columns, rows // 8),)),
            "qzeros": Expected((torch.int32,), ((groups, rows // 8),)),
            "scales": Expected(FLOATS, ((groups, rows),)),
            "bias": Expected(FLOATS, ((rows,),), optional=True),
        }

    def matrix(
        self, module: str, tensors: dict[str, Tensor], rows: int, columns: int
    ) -> tuple[QuantizedWeight, Tensor | None]:
        codes, zeros = (fields(tensors[name], 4)[..., PLACE].flatten(1).T for name in ("qweight", "qzeros"))
        return Matrix(4, codes, tensors["scales"].T, zeros, neighbours(columns, self.group)).stored(module)
