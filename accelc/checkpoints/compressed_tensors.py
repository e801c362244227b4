"""Checkpoints of compressed-tensors (llm-compressor): weights in integers of 4 or 8 bits.

A linear [N, K] has, in format

* "pack-quantized", with b bits in words of 32: ``weight_packed`` int32 [N, K b / 32], codes of neighbouring columns,
  lowest first, with 2^(b - 1) added; ``weight_shape`` [2], which is [N, K]; for asymmetric schemes
  ``weight_zero_point`` int32 [N b / 32, G], packed along N in the same way (older files: int8 [N, G], not packed),
* "int-quantized": ``weight`` int8 [N, K] and ``weight_zero_point`` int8 [N, G], signed,

and in both ``weight_scale`` [N, G] (one value for strategy "tensor") and, where columns of a group are no neighbours
(``actorder``), ``weight_g_idx`` int32 [K].

``config_groups`` gives the weights' scheme of the modules that ``targets`` names: by name, "re:" and a regular
expression, or class ("Linear"). Schemes that quantize activations as well are loaded without that: activations stay as
they are.

Source: compressed-tensors, compressors/quantized_compressors/pack_quantized.py (`pack_to_int32`) and
naive_quantized.py, quantization/quant_args.py and quant_config.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelc.checkpoints.formats import FLOATS, Expected, setting
from accelc.checkpoints.groups import Matrix, neighbours
from accelc.checkpoints.words import fields
from accelc.ir.errors import CheckpointError, CheckpointFormatError
from accelc.ir.quantized import BITS, QuantizedWeight

PACKED, PLAIN = ("pack-quantized",), ("int-quantized", "naive-quantized")
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
"""Of quantized activations."""


@dataclass(frozen=True)
class Group:
    """One of ``config_groups``. ``size``: columns that share a scale, -1 all of a row, 0 the whole matrix."""

    targets: tuple[str, ...]
    packed: bool
    bits: int
    size: int
    symmetric: bool

    @classmethod
    def of(cls, settings: dict[str, Any], form: str | None) -> Group:
        """Raises CheckpointFormatError."""
        weights = settings.get("weights")
        targets = settings.get("targets")
        if not isinstance(weights, dict) or not isinstance(targets, list):
            raise CheckpointFormatError("a config group without weights or targets", where="quantization_config")
        form = setting({"format": settings.get("format") or form}, "format", (*PACKED, *PLAIN))
        setting(weights, "type", ("int",), "int")
        bits = setting(weights, "num_bits", BITS, 8)
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
        setting({"strategy": strategy}, "strategy", ("group", "channel", "tensor"))
        if strategy == "group" and not (isinstance(size, int) and size > 0):
            raise CheckpointFormatError(f"group_size is {size!r}", where="quantization_config")
        columns = {"channel": -1, "tensor": 0}.get(strategy, size or 0)
        return cls(tuple(targets), form in PACKED, bits, columns, bool(weights.get("symmetric", True)))

    def names(self, module: str) -> bool:
        """Whether a target is the name of `module`, or a regular expression for it."""
        return any(
            re.match(t.removeprefix("re:"), module) is not None if t.startswith("re:") else t == module
            for t in self.targets
        )


@dataclass(frozen=True)
class CompressedTensors:
    """``groups`` in the order of the configuration."""

    groups: tuple[Group, ...]
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> CompressedTensors:
        """From ``quantization_config``. Raises CheckpointFormatError."""
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()) or not groups:
            raise CheckpointFormatError("config_groups is empty or no object", where="quantization_config")
        setting(settings, "kv_cache_scheme", (None,))
        setting(settings.get("sparsity_config") or {}, "format", (None, "dense"))
        if settings.get("transform_config"):
            raise CheckpointFormatError(
                "transform_config rotates activations", remedy="Take a checkpoint without it, or the float model."
            )
        return cls(tuple(Group.of(group, settings.get("format")) for group in groups.values()))

    def expected(self, module: str, rows: int, columns: int) -> dict[str, Expected]:
        group = self._group(module)
        groups = -(-columns // group.size) if group.size > 0 else 1
        scale = ((rows, groups),) if group.size else ((1,), (), (1, 1))
        per_word = 32 // group.bits
        if group.packed:
            words = -(-rows // per_word)
            weight = {
                "weight_packed": Expected((torch.int32,), ((rows, -(-columns // per_word)),)),
                "weight_shape": Expected((torch.int32, torch.int64), ((2,),)),
            }
            zeros = Expected((torch.int32, torch.int8), ((words, groups), (rows, groups)))
        else:
            weight = {"weight": Expected((torch.int8,), ((rows, columns),))}
            zeros = Expected((torch.int8,), scale, optional=group.symmetric)
        asymmetric = not (group.packed and group.symmetric)
        return {
            **weight,
            "weight_scale": Expected(FLOATS, scale),
            **({"weight_zero_point": zeros} if asymmetric else {}),
            "weight_g_idx": Expected((torch.int32, torch.int64), ((columns,),), optional=True),
            "bias": Expected(FLOATS, ((rows,),), optional=True),
            **{name: Expected((*FLOATS, torch.int8), (), optional=True) for name in UNUSED},
        }

    def matrix(
        self, module: str, tensors: dict[str, Tensor], rows: int, columns: int
    ) -> tuple[QuantizedWeight, Tensor | None]:
        group = self._group(module)
        middle = 1 << (group.bits - 1)
        if group.packed:
            if tensors["weight_shape"].tolist() != [rows, columns]:
                raise CheckpointError(
                    f"{module}.weight_shape is {tensors['weight_shape'].tolist()}, expected {[rows, columns]}"
                )
            codes = fields(tensors["weight_packed"], group.bits).flatten(1)[:, :columns]
        else:
            codes = _unsigned(tensors["weight"], middle)
        scales = tensors["weight_scale"].reshape(-1, tensors["weight_scale"].shape[-1] if group.size else 1)
        zeros = tensors.get("weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = fields(zeros.T, group.bits).flatten(1)[:, :rows].T
        elif zeros is not None:
            zeros = _unsigned(zeros.reshape(scales.shape), middle)
        if not group.size:
            scales = scales.expand(rows, 1)
            zeros = None if zeros is None else zeros.expand(rows, 1)
        groups = tensors["weight_g_idx"].long() if "weight_g_idx" in tensors else neighbours(columns, group.size)
        if bool((groups == -1).all()):  # what is written where there is no order
            groups = neighbours(columns, group.size)
        if int(groups.min()) < 0 or int(groups.max()) >= scales.shape[1]:
            raise CheckpointFormatError(
                f"{module}.weight_g_idx names a group outside of the {scales.shape[1]} there are"
            )
        return Matrix(group.bits, codes, scales, zeros, groups).stored(module)

    def _group(self, module: str) -> Group:
        """The first group that names the module, or that is for linears."""
        found = [g for g in self.groups if g.names(module)] or [g for g in self.groups if "Linear" in g.targets]
        if not found:
            raise CheckpointFormatError(f"no config group is for {module}", where="quantization_config")
        return found[0]


def _unsigned(signed: Tensor, middle: int) -> Tensor:
    """Codes int8 around zero as uint8 around `middle`."""
    return (signed.to(torch.int16) + middle).to(torch.uint8)
