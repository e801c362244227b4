"""Checkpoints of other tools, written element by element from their formats' descriptions, and what they mean.

A `Quantized` matrix is known by its codes; packers turn it into the tensors of a format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Quantized:
    """codes, zeros: int [N, K] and [N, G], unsigned; scales [N, G]; groups int [K]."""

    bits: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    @property
    def weight(self) -> Tensor:
        """(code - zero) * scale, one element after another, in fp32."""
        rows, columns = self.codes.shape
        out = torch.empty(rows, columns)
        zeros, scales = self.zeros.float(), self.scales.float()
        for k in range(columns):
            g = int(self.groups[k])
            out[:, k] = (self.codes[:, k].float() - zeros[:, g]) * scales[:, g]
        return out


def random_matrix(
    rows: int, columns: int, group: int, *, bits: int = 4, symmetric: bool = False, act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Quantized:  # fmt: skip
    """Codes, zeros and scales at random; the magnitude of the weights is that of a trained linear's."""
    groups = torch.tensor([k // group if group > 0 else 0 for k in range(columns)])
    if act_order:
        groups = groups[torch.randperm(columns)]
    count = (columns + group - 1) // group if group > 0 else 1
    high = 1 << bits
    codes = torch.randint(0, high, (rows, columns))
    zeros = torch.full((rows, count), high // 2) if symmetric else torch.randint(0, high, (rows, count))
    scales = (torch.rand(rows, count) + 0.5) * columns**-0.5 / (high // 4)
    return Quantized(bits, codes, zeros, scales.to(dtype), groups)


def word(values: list[int], bits: int) -> int:
    """A signed 32-bit word with the first value in the lowest bits."""
    total = 0
    for position, value in enumerate(values):
        total += value * 2 ** (position * bits)
    return total - 2**32 if total >= 2**31 else total


def gptq(q: Quantized, *, v2: bool = False, g_idx: bool = True) -> dict[str, Tensor]:
    per = 32 // q.bits
    rows, columns = q.codes.shape
    codes, zeros = q.codes.tolist(), q.zeros.tolist()
    qweight = [[word([codes[n][w * per + i] for i in range(per)], q.bits) for n in range(rows)]
               for w in range(columns // per)]  # fmt: skip
    less = 0 if v2 else 1
    qzeros = [[word([(zeros[w * per + i][g] - less) % 2**q.bits for i in range(per)], q.bits)
               for w in range(rows // per)] for g in range(q.scales.shape[1])]  # fmt: skip
    tensors = {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": q.scales.T.contiguous(),
    }
    return {**tensors, "g_idx": q.groups.to(torch.int32)} if g_idx else tensors


def awq(q: Quantized) -> dict[str, Tensor]:
    rows, columns = q.codes.shape
    codes, zeros = q.codes.tolist(), q.zeros.tolist()
    qweight = [[word([codes[w * 8 + i][k] for i in AWQ_ORDER], 4) for w in range(rows // 8)] for k in range(columns)]
    qzeros = [[word([zeros[w * 8 + i][g] for i in AWQ_ORDER], 4) for w in range(rows // 8)]
              for g in range(q.scales.shape[1])]  # fmt: skip
    return {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": q.scales.T.contiguous(),
    }


def packed(q: Quantized, *, symmetric: bool) -> dict[str, Tensor]:
    """compressed-tensors, "pack-quantized"; rows and columns are padded to whole words with zeros."""
    per = 32 // q.bits
    rows, columns = q.codes.shape
    wide = [row + [0] * (-columns % per) for row in q.codes.tolist()]
    tall = q.zeros.tolist() + [[0] * q.zeros.shape[1]] * (-rows % per)
    tensors = {
        "weight_packed": torch.tensor(
            [[word(row[i : i + per], q.bits) for i in range(0, len(row), per)] for row in wide], dtype=torch.int32
        ),
        "weight_scale": q.scales.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.tensor(
            [[word([tall[i + j][g] for j in range(per)], q.bits) for g in range(q.zeros.shape[1])]
             for i in range(0, len(tall), per)], dtype=torch.int32
        )  # fmt: skip
    return tensors


def plain(q: Quantized, *, symmetric: bool) -> dict[str, Tensor]:
    """compressed-tensors, "int-quantized"."""
    middle = 2 ** (q.bits - 1)
    tensors = {"weight": (q.codes - middle).to(torch.int8), "weight_scale": q.scales.contiguous()}
    return tensors if symmetric else {**tensors, "weight_zero_point": (q.zeros - middle).to(torch.int8)}


def write(
    model: nn.Module,
    folder: Path,
    settings: dict[str, Any],
    make: Callable[[int, int], Quantized],
    pack: Callable[[Quantized], dict[str, Tensor]],
    skip: str = "lm_head",
) -> dict[str, Quantized]:
    """Write a transformers `model` with every linear but `skip` quantized: the matrices that `make` gives, by name.

    The model's own linears get the values that these mean.
    """
    matrices, tensors = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != skip:
            q = matrices[name] = make(module.out_features, module.in_features)
            tensors |= {f"{name}.{last}": t for last, t in pack(q).items()}
            with torch.no_grad():
                module.weight.copy_(q.weight)
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") not in matrices and not (name == "lm_head.weight" and tied(model)):
            tensors[name] = value.clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return matrices


EXPERTS = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
"""A matrix of a Mixtral expert in files: the stack that transformers keeps it in, and which half of its rows."""


def write_experts(
    model: nn.Module,
    folder: Path,
    settings: dict[str, Any],
    make: Callable[[int, int], Quantized],
    pack: Callable[[Quantized], dict[str, Tensor]],
) -> dict[str, Quantized]:
    """As `write` for a Mixtral `model`, as others write it: every expert by itself, quantized too."""
    matrices = write(model, folder, settings, make, pack, skip="lm_head")
    path = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(path).items():
        owner, _, last = name.rpartition(".")
        if not owner.endswith("mlp.experts"):
            renamed = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            tensors[renamed] = value.clone()
            continue
        stack = model.get_parameter(name)
        for part, (kept_in, half) in EXPERTS.items():
            if kept_in != last:
                continue
            rows = stack.shape[1] // (2 if last == "gate_up_proj" else 1)
            for expert in range(len(stack)):
                q = make(rows, stack.shape[2])
                prefix = f"{owner.replace('.mlp.experts', '.block_sparse_moe.experts')}.{expert}.{part}"
                matrices[prefix] = q
                tensors |= {f"{prefix}.{end}": t for end, t in pack(q).items()}
                with torch.no_grad():
                    stack[expert, half * rows : (half + 1) * rows] = q.weight
    save_file(tensors, path)
    return matrices


def tied(model: nn.Module) -> bool:
    return bool(model.config.tie_word_embeddings)
