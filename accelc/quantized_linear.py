"""Modules whose weights are in few bits: a model made of them is captured like any other, and its graph reads codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from accelc.ir.errors import InputError, TokenRangeError
from accelc.ir.quantized import SCALES, QuantizedWeight, Scheme


class QuantizedModule(nn.Module):
    """Holds a `QuantizedWeight`, a matrix [N, K] or a stack of them [E, N, K]: ``codes``, ``scales`` and, for
    asymmetric schemes, ``zeros``.

    They are parameters without gradient, not buffers: what is compiled does not depend on their values. Modules made of
    one another's parameters share them.
    """

    zeros: nn.Parameter | None
    rank: ClassVar[int] = 2

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        if len(weight.shape) != self.rank:
            raise InputError(f"a {type(self).__name__} takes no quantized weight {list(weight.shape)}")
        self.scheme: Scheme = weight.scheme
        self.rows, self.columns = weight.rows, weight.columns
        self.codes = _parameter(weight.codes)
        self.scales = _parameter(weight.scales)
        self.register_parameter("zeros", None if weight.zeros is None else _parameter(weight.zeros))

    def weight_value(self) -> QuantizedWeight:
        """The weight; its tensors are the module's own."""
        return QuantizedWeight(self.scheme, self.codes, self.scales, self.zeros, self.rows, self.columns)

    def stored_scheme(self) -> Scheme:
        """The scheme with the dtype that the scales have now: `Module.half` and its kin change it. Raises InputError
        for one that no scheme has.
        """
        if self.scales.dtype not in SCALES.values():
            raise InputError(
                f"the scales of a {type(self).__name__} are {str(self.scales.dtype).removeprefix('torch.')}",
                remedy="Convert the model to float32, bfloat16 or float16: quantized weights have no other scales.",
            )
        return replace(self.scheme, scale_dtype=self.scales.dtype)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.scheme}"


class QuantizedLinear(QuantizedModule):
    """A linear layer x [..., K] -> [..., N] by `accelc::quantized_linear`; ``bias`` [N] or None.

    ``order`` int64 [K], a permutation, says which column of x each column of the weight belongs to (act-order
    checkpoints keep groups of columns that are no neighbours): the product is with ``x[..., order]``.
    """

    bias: nn.Parameter | None
    order: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, order: Tensor | None = None) -> None:
        super().__init__(weight)
        self.in_features, self.out_features = weight.columns, weight.rows
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self.register_parameter("order", None if order is None else _parameter(order))

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] in the order of x's columns, dequantized to fp32 anew each time; for code that reads it."""
        weight = torch.ops.accelc.dequantize(
            self.codes, self.scales, self.zeros, self.scheme.bits, self.rows, self.columns, torch.float32
        )
        return weight if self.order is None else weight.index_select(1, torch.argsort(self.order))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.columns:  # within the padding of its rows the product would not notice
            raise InputError(
                f"rows of {x.shape[-1]} for a quantized linear of {self.columns} columns",
                remedy=f"Give x [..., {self.columns}].",
            )
        if self.order is not None:
            x = torch.index_select(x, -1, self.order)
        return torch.ops.accelc.quantized_linear(  # type: ignore[no-any-return]
            x, self.codes, self.scales, self.zeros, self.bias, self.scheme.bits, self.rows
        )


class _OfDtype(QuantizedModule):
    """One that gives values of ``dtype``, which `Module.to` and its kin change."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class QuantizedEmbedding(_OfDtype):
    """A look-up of ids [...] -> [..., K] in ``dtype`` by `accelc::quantized_embedding`. On CPUs, when it is not
    compiled, ids outside the table are a TokenRangeError.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.num_embeddings, self.embedding_dim = weight.rows, weight.columns

    @property
    def weight(self) -> Tensor:
        """The table [N, K], dequantized anew each time; for code that reads it."""
        return torch.ops.accelc.dequantize(  # type: ignore[no-any-return]
            self.codes, self.scales, self.zeros, self.scheme.bits, self.rows, self.columns, self.dtype
        )

    def forward(self, ids: Tensor) -> Tensor:
        if ids.numel() and ids.device.type == "cpu" and not torch.compiler.is_compiling():
            lowest, highest = (int(extreme) for extreme in ids.aminmax())
            if lowest < 0 or highest >= self.rows:  # rows of padding are there, and below 0 others
                wrong = lowest if lowest < 0 else highest
                raise TokenRangeError(f"the id {wrong} lies outside a quantized table of {self.rows} rows")
        return torch.ops.accelc.quantized_embedding(  # type: ignore[no-any-return]
            ids, self.codes, self.scales, self.zeros, self.scheme.bits, self.columns, self.dtype
        )


class QuantizedStack(_OfDtype):
    """A stack of matrices [E, N, K], as the experts of a mixture are, that another module multiplies by itself."""

    rank = 3

    @property
    def weight(self) -> Tensor:
        """The stack, dequantized anew each time; the pass `read_codes` lets products read the codes instead."""
        return torch.ops.accelc.dequantize(  # type: ignore[no-any-return]
            self.codes, self.scales, self.zeros, self.scheme.bits, self.rows, self.columns, self.dtype
        )


STACK = "_quantized"
"""Behind the name of a parameter: the `QuantizedStack` that took its place."""


def put_stack(owner: nn.Module, name: str, stack: QuantizedStack) -> None:
    """Let a module whose parameter `name` is a stack of matrices read `stack` in its place: its class becomes one of
    the same name with a property.
    """
    del owner._parameters[name]
    owner.add_module(name + STACK, stack)
    owner.__class__ = _with_stacks(type(owner), name)  # type: ignore[arg-type]


@functools.cache
def _with_stacks(cls: type[nn.Module], name: str) -> type[nn.Module]:
    return type(cls.__name__, (cls,), {name: property(lambda module: getattr(module, name + STACK).weight)})


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
