"""What the kernels use on each target, as a table:

python -m accelc.codegen.gpu.resources            # prints it
python -m accelc.codegen.gpu.resources docs/gpu-kernels.md  # and puts it between the marks of a page
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton

from accelc.ir.quantized import Scheme

from . import attention, attention_kernels, cross, kernels
from .attention import Blocks
from .quantized_gemm import constants
from .tiles import Tile, Weights, candidates

BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"
SCHEMES = ("int4", "int4:asym", "int4:g32", "int8", "int8:g128:bf16")
TOKENS = (16, 64)
ROWS, COLUMNS = 14336, 4096
"""The gate projection of Llama-3.1-8B."""
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def default_tile(shape: Weights, count: int, target: str) -> Tile:
    """The tile that a product takes on a target as long as none is measured."""
    return candidates(shape, count, target)[0]


def compile_product(
    target: str, shape: Weights, tile: Tile, dtype: torch.dtype = torch.bfloat16, activation: str = "none"
) -> cross.Report:
    """Compile the kernel for a weight and a tile, with bias and residual. Raises CrossCompileError."""
    scheme, of_x = shape.scheme, TYPES[dtype]
    fixed = constants(tile, shape, split=tile.split, target=target) | {"ACTIVATION": activation}
    types = {name: "i32" for name in kernels.quantized_gemm_kernel.arg_names if name not in fixed}
    pointers = {
        "x_ptr": of_x, "codes_ptr": "i16", "scales_ptr": TYPES[scheme.scale_dtype],
        "zeros_ptr": TYPES[scheme.scale_dtype], "bias_ptr": of_x, "residual_ptr": of_x,
        "out_ptr": of_x if tile.split == 1 else "fp32",
    }  # fmt: skip
    types |= {name: f"*{kind}" for name, kind in pointers.items()}
    if scheme.symmetric:
        fixed["zeros_ptr"] = None
    if tile.split > 1:
        fixed |= {"bias_ptr": None, "residual_ptr": None}
    return cross.compile_for(
        kernels.quantized_gemm_kernel, target, types, fixed,
        divisible=[*pointers, "N", "K", "x_stride", "residual_stride"], warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def compile_attention(
    target: str, blocks: Blocks, width: int, value_width: int, *, dtype: torch.dtype = torch.bfloat16, group: int = 4,
    words: int = 0, mask: str = "causal", whole: bool = False,
) -> cross.Report:  # fmt: skip
    """Compile the attention kernel for keys and values of a width; ``words`` of ancestors' bits a node; ``whole``: with
    a bias, slopes and a soft cap. Raises CrossCompileError.
    """
    kernel, of = attention_kernels.attention_kernel, TYPES[dtype]
    fixed = attention.constants(8, group, width, value_width, words, mask, float(whole), blocks, interpreted=False)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "slopes_ptr"), f"*{of}")
    pointers |= dict.fromkeys(("positions_ptr", "lengths_ptr", "tree_ptr"), "*i64")
    pointers |= dict.fromkeys(("parts_ptr", "sums_ptr", "bias_ptr"), "*fp32")
    absent = [*(() if words else ("tree_ptr",)), *(() if whole else ("bias_ptr", "slopes_ptr"))]
    fixed |= dict.fromkeys(absent)
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | {"scale": "fp32", "softcap": "fp32"}
    strides = [name for name in kernel.arg_names if name.startswith(("q_", "k_", "v_"))]
    return cross.compile_for(
        kernel, target, {name: kind for name, kind in types.items() if name not in fixed}, fixed,
        divisible=[*pointers, *strides], warps=blocks.warps, stages=blocks.stages,
    )  # fmt: skip


def weights_of_loop(shape: Weights, tile: Tile, lanes: int) -> float:
    """Weights that a thread takes in an iteration of the main loop."""
    return tile.rows * shape.step * tile.unroll / (tile.warps * lanes)


def table() -> list[str]:
    """The Markdown table."""
    lines = [
        "| target | weights | M | tile | registers | spills | shared KiB | warps resident | instructions a weight | "
        "of them matrix, unpack, scale, load, wait, rest |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for target in cross.TARGETS:
        for text in SCHEMES:
            shape = Weights(Scheme.parse(text), ROWS, COLUMNS)
            for count in TOKENS:
                tile = default_tile(shape, count, target)
                report = compile_product(target, shape, tile)
                weights = weights_of_loop(shape, tile, 64 if target.startswith("gfx") else 32)
                kinds = report.loop.kinds() if report.loop else {}
                parts = ", ".join(
                    f"{kinds[kind] / weights:.2f}" for kind in ("matrix", "unpack", "scale", "load", "wait", "rest")
                )
                lines.append(
                    f"| {target} | {text} | {count} | {tile} | {report.registers} | {report.spills} | "
                    f"{report.shared / 1024:.1f} | {report.occupancy:.0%} | {report.per_weight(weights):.2f} | "
                    f"{parts} |"
                )
    return lines


def main(arguments: list[str]) -> None:
    """Print the table; with the path of a page, put it there between the marks."""
    text = f"Triton {triton.__version__}, bf16 activations, a weight of {ROWS} x {COLUMNS}.\n\n" + "\n".join(table())
    print(text)
    for path in map(Path, arguments):
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
