"""Gives operations of the dialect their CUDA kernels, and keeps each quantized weight in the order of its kernel.

Importing `accelc.codegen` registers it; Triton is imported when it first runs.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from accelc.ir.compat import storage_key
from accelc.ir.dialect import attention, attention_reference, cache_update, cache_update_reference
from accelc.ir.quantized import QuantizedWeight, Scheme
from accelc.ir.quantized_ops import quantized_linear, quantized_linear_reference

from .layout import TiledWeight, tile_weight

DTYPES = (torch.bfloat16, torch.float16)
"""Of activations that the kernel takes."""


@functools.cache
def register() -> None:
    """Register the kernels; again does nothing."""
    quantized_linear.register_kernel("cuda")(quantized_linear_gpu)
    attention.register_kernel("cuda")(attention_cuda)
    cache_update.register_kernel("cuda")(cache_update_cuda)


def attention_cuda(query: Tensor, key: Tensor, value: Tensor, *more: Any) -> Tensor:
    """`accelc::attention` by the Triton kernels; in fp64 by the reference, which is announced once."""
    if query.dtype not in (*DTYPES, torch.float32) or not query.dtype == key.dtype == value.dtype:
        _announce(f"attention with {query.dtype} queries and {key.dtype} keys")
        return attention_reference(query, key, value, *more)
    what = f"attention with {query.dtype} keys of {key.shape[-1]} and values of {value.shape[-1]}"
    if what not in REFUSED:
        from triton.errors import TritonError

        from .attention import attention_gpu

        try:
            return attention_gpu(query, key, value, *more)
        except TritonError as error:  # it does not compile for the device, or needs more than that has
            REFUSED.add(what)
            _announce(f"{what} ({type(error).__name__}: {error})")
    return attention_reference(query, key, value, *more)


def cache_update_cuda(cache: Tensor, value: Tensor, lengths: Tensor, dim: int) -> None:
    """`accelc::cache_update` by the Triton kernel; where a cache is no contiguous memory, by torch."""
    from .cache import cache_update_gpu, takes  # imports Triton

    (cache_update_gpu if takes(cache, dim) else cache_update_reference)(cache, value, lengths, dim)


def quantized_linear_gpu(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, rows: int
) -> Tensor:
    """`accelc::quantized_linear` by the Triton kernel: x [..., K] to [..., N] in x's dtype.

    Activations in fp32 and weights of several matrices take the reference, which is announced once.
    """
    if x.dtype not in DTYPES or codes.ndim != 3:
        _announce(f"quantized_linear with {x.dtype} and codes of {codes.ndim} dims")
        return quantized_linear_reference(x, codes, scales, zeros, bias, bits, rows)
    from .quantized_gemm import quantized_gemm  # imports Triton

    flat = x.reshape(-1, x.shape[-1])
    weight = TILED.of(codes, scales, zeros, bits, rows, x.shape[-1])
    y = quantized_gemm(flat if flat.stride(1) == 1 else flat.contiguous(), weight, bias)
    return y.view(*x.shape[:-1], rows)


class TiledWeights:
    """Weights in the kernel's order, made at their first use. An entry lives as long as the storage of the codes that
    it was made from, and is made anew when those are written to.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[object, ...], tuple[StorageWeakRef, TiledWeight]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def of(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int
    ) -> TiledWeight:
        """The weight [rows, columns] of the operands of `accelc::quantized_linear`."""
        tensors = [codes, scales] if zeros is None else [codes, scales, zeros]
        key = (*(_identity(t) for t in tensors), bits, rows, columns)
        found = self._entries.get(key)
        if found is not None and not found[0].expired():
            return found[1]
        self._entries = {k: entry for k, entry in self._entries.items() if not entry[0].expired()}
        padded, groups = codes.shape[1] * 32 // bits, scales.shape[1]
        scheme = Scheme(bits, 0 if groups == 1 else padded // groups, zeros is None, scales.dtype)
        made = tile_weight(QuantizedWeight(scheme, codes, scales, zeros, rows, columns))
        # Older versions of the same codes are never asked for again.
        self._entries = {k: entry for k, entry in self._entries.items() if k[0][:-1] != key[0][:-1]}  # type: ignore[index]
        self._entries[key] = (StorageWeakRef(codes.untyped_storage()), made)
        return made


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for views of the same memory that has not been written to in between."""
    version = 0 if tensor.is_inference() else tensor._version
    return storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), version


@functools.cache
def _announce(what: str) -> None:
    warnings.warn(f"accelc: {what} has no GPU kernel and runs as plain torch operations", stacklevel=3)


REFUSED: set[str] = set()
"""What the device's compiler or the device does not take."""
TILED = TiledWeights()
"""Of this process."""
