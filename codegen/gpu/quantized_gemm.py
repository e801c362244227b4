"""Products of few rows with weights in few bits on a GPU: checks, tiles, and the launch of the Triton kernels."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import kernels, measure, tuning
from .errors import KernelInputError
from .launch import is_interpreted
from .layout import BAND, TiledWeight, unit_columns, untile_weight
from .tiles import Tile, Weights, candidates

Activation = Literal["none", "silu", "gelu_tanh", "relu"]
SUM_COLUMNS = 256
"""Outputs of one program of the kernel that adds the parts."""


def quantized_gemm(
    x: Tensor,
    weight: TiledWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "none",
    *,
    tile: Tile | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, in one kernel, or two where K is split: [M, N] in x's dtype.

    ``x`` [M, K] bfloat16 or float16, its rows contiguous; ``weight`` made by `accelc.codegen.gpu.tile_weight`; ``bias``
    [N] and ``residual`` [M, N] of any float dtype. Made for M up to 64; more rows are taken 64 at a time. Sums are in
    fp32 over weights that are not rounded first, and in a fixed order: the same inputs give the same bits.

    ``tile``: None takes the one measured by `accelc.codegen.gpu.tuning.tune` for this shape and device, or else the
    best by arithmetic.

    Raises KernelInputError for operands that do not fit, KernelConfigError for tiles that do not exist.
    """
    _check(x, weight, bias, residual, activation)
    count, n = x.shape[0], weight.rows
    out = x.new_empty((count, n))
    if out.numel() == 0:
        return out
    shape = Weights.of(weight)
    target = target_of(x.device)
    tile = tile or tuning.choose(shape, count, x.dtype, device_name(x.device), target)
    steps = shape.steps
    per_split = -(-steps // tile.split)
    split = -(-steps // per_split)  # no split without a step
    into = out if split == 1 else torch.empty((split, count, n), dtype=torch.float32, device=x.device)
    residual_stride = 0 if residual is None else residual.stride(0)
    fused = split == 1
    grid = (-(-n // tile.rows), split, -(-count // tile.tokens))
    kernels.quantized_gemm_kernel[grid](
        x, weight.codes, weight.scales, weight.zeros,
        bias if fused else None, residual if fused else None, into,
        count, n, x.shape[1], x.stride(0), residual_stride,
        weight.codes.shape[0], weight.codes.shape[1], weight.groups, steps, per_split,
        **constants(tile, shape, split=split, target=target),
        ACTIVATION=activation if fused else "none",
        num_warps=tile.warps, num_stages=tile.stages, **_options(target),
    )  # fmt: skip
    if split > 1:
        kernels.split_sum_kernel[(-(-n // SUM_COLUMNS), count)](
            into, bias, residual, out, count, n, residual_stride,
            SPLIT=split, COLUMNS=SUM_COLUMNS, PDL=dependent_launch(target), ACTIVATION=activation, num_warps=4,
            **_options(target),
        )  # fmt: skip
    return out


def constants(tile: Tile, shape: Weights, *, split: int, target: str) -> dict[str, Any]:
    """The compile-time arguments of `quantized_gemm_kernel` but its activation; `target` such as "sm_90", "gfx942" or
    "interpreter".
    """
    cuda = target.startswith("sm_")
    return {
        "BITS": shape.scheme.bits, "GROUP": shape.scheme.group, "STEP": shape.step,
        "WIDE": unit_columns(shape.scheme), "ROWS": tile.rows, "TOKENS": tile.tokens, "STAGES": tile.stages,
        "UNROLL": tile.unroll, "PARTIAL": split > 1, "WARPS": tile.warps, "MODE": tile.mode,
        "EVEN": shape.columns == shape.padded, "ASM": cuda, "WGMMA": target.startswith("sm_9"),
        "WIDEN": target == "interpreter", "PDL": dependent_launch(target),
    }  # fmt: skip


def tune(x: Tensor, weight: TiledWeight, most: int = 12) -> dict[Tile, float]:
    """Measure the `most` best tiles by arithmetic for x [M, K] and remember the fastest for this device, kernel and
    shape; microseconds of each. Not while a CUDA graph is captured. Tiles that the device refuses are left out, and
    with a warning those whose result is wrong or differs from one run to the next.
    """
    _check(x, weight, None, None, "none")
    shape, device, target = Weights.of(weight), device_name(x.device), target_of(x.device)
    want = x.float() @ untile_weight(weight).dequantize().T
    copies = measure.copies_beyond_the_cache(weight)
    measured: dict[Tile, float] = {}
    for tile in candidates(shape, x.shape[0], target)[:most]:
        products = [functools.partial(quantized_gemm, x, one, tile=tile) for one in copies]
        try:
            if wrong := measure.what_is_wrong([product() for product in products], want):
                warnings.warn(f"accelc: a kernel is not used, {wrong}: {tile} for {shape}", stacklevel=2)
                continue
            measured[tile] = 1e6 * measure.seconds_in_a_graph(products)
        except OutOfResources:
            continue
    if measured:
        best = min(measured, key=measured.__getitem__)
        tuning.remember(shape, x.shape[0], x.dtype, device, target, best, measured[best])
    return measured


def device_name(device: torch.device) -> str:
    """What measured tiles are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def target_of(device: torch.device) -> str:
    """The target that kernels for a device are compiled for."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return is_interpreted(kernels.quantized_gemm_kernel)


def dependent_launch(target: str) -> bool:
    """Whether a target launches a kernel while the one before it drains (NVIDIA's programmatic dependent launch).

    A kernel so launched waits, before it reads anything, until all that was written before it can be seen. On an H200
    that saves about 1 us a product, as many as the kernels that add parts of K.
    """
    return target.startswith("sm_") and int(target[3:]) >= 90


def _options(target: str) -> dict[str, Any]:
    """Options of the compiler and of launches; the interpreter knows none."""
    if interpreted():
        return {}
    # The default of the first changes between versions of Triton.
    return {"enable_fp_fusion": True} | ({"launch_pdl": True} if dependent_launch(target) else {})


def _check(x: Tensor, weight: TiledWeight, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    where = f"x {list(x.shape)} {x.dtype}, weight [{weight.rows}, {weight.columns}] {weight.scheme}"
    if x.ndim != 2 or x.shape[1] != weight.columns:
        raise KernelInputError("x must be [M, K] with the K of the weight", where=where)
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise KernelInputError("x must be bfloat16 or float16", where=where)
    if x.stride(1) != 1:
        raise KernelInputError("the rows of x must be contiguous", where=where, remedy="Call x.contiguous() first.")
    if bias is not None and (bias.shape != (weight.rows,) or not bias.is_contiguous()):
        raise KernelInputError(f"bias must be contiguous [N], it is {list(bias.shape)}", where=where)
    if residual is not None and (residual.shape != (x.shape[0], weight.rows) or residual.stride(1) != 1):
        raise KernelInputError(
            f"residual must be [M, N] with contiguous rows, it is {list(residual.shape)}", where=where
        )
    for name, tensor in (("weight", weight.codes), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise KernelInputError(f"{name} is on {tensor.device} and x on {x.device}", where=where)
        if name != "weight" and tensor is not None and not tensor.is_floating_point():
            raise KernelInputError(f"{name} must be floating point, it is {tensor.dtype}", where=where)
    if activation not in get_args(Activation):
        raise KernelInputError(
            f"no activation {activation!r}", where=where, remedy=f"One of {', '.join(get_args(Activation))}."
        )
    if x.device.type != "cuda" and not interpreted():
        raise KernelInputError(
            f"x is on {x.device}", where=where,
            remedy="The kernel runs on GPUs; on CPUs use accelc::quantized_linear.",
        )  # fmt: skip
    if weight.codes.shape[0] * BAND < weight.rows:
        raise KernelInputError("the codes hold fewer rows than the weight says", where=where)
