"""A step at fixed sizes, ready to run: its plan with memory, the native stream, and torch views for what torch
computes.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accelc.codegen.arrays import Array
from accelc.codegen.errors import StepIndexError
from accelc.codegen.instructions import Gemm, Instruction
from accelc.codegen.native import Library
from accelc.codegen.planner import ARENA, Call, Native, Plan, encode

FAILURES = {
    1: "An index (a token id or a position) lies outside its table.",
    2: "A cache has no room for the new tokens: lengths + N exceeds its capacity.",
}


class Instance:
    """Runs a `Plan`. Not thread-safe: it owns the memory of the intermediate values."""

    def __init__(self, plan: Plan, constants: Mapping[int, Tensor], library: Library, threads: int) -> None:
        self._plan = plan
        self._kernels = library.kernels
        self._arena = torch.empty(plan.arena_bytes + 64, dtype=torch.uint8)
        start = -self._arena.data_ptr() % 64
        self._arena = self._arena[start:]
        self._bases = (ctypes.c_void_p * plan.bases)()
        self._bases[ARENA] = self._arena.data_ptr()
        self._tensors: list[Tensor | None] = [None] * plan.bases  # whole storages, flat, for views
        for root, tensor in {**constants, **plan.constants}.items():
            base = plan.base_of[root]
            self._bases[base] = tensor.untyped_storage().data_ptr()
            self._tensors[base] = tensor
        self._handle = library.plan(encode(plan), {ins.op for ins, _ in plan.stream}, threads)
        self._inputs = plan.inputs
        self._stages = [self._stage(stage) for stage in plan.stages]
        self._fresh = [(plan.base_of[root], a.size, a.stride, a.dtype) for root, a in plan.fresh.items()]
        # The common case: every output is a freshly allocated tensor as it is.
        self._direct = len(plan.outputs) == len(self._fresh) and all(
            plan.fresh.get(out.root) == out for out in plan.outputs
        )
        self._order = [plan.base_of[out.root] for out in plan.outputs] if self._direct else []
        self._out_views = [] if self._direct else [self._view(out) for out in plan.outputs]
        self._addressed: object = None
        """Whose inputs' addresses stand in the bases: what `bind` made last and nobody else ran since."""

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._kernels.accelc_plan_free(handle)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run once. `inputs` match the plan's in shape, dtype and contiguity."""
        self._addressed = None
        for base, tensor in zip(self._inputs, inputs):
            self._bases[base] = tensor.data_ptr()
            self._tensors[base] = tensor
        result = self._execute()
        for base in self._inputs:
            self._tensors[base] = None
        return result

    def _execute(self) -> tuple[Tensor, ...]:
        """Run on the inputs whose addresses stand in the bases. What is returned is the caller's alone."""
        tensors = self._tensors
        self._provide(self._new_outputs())
        for stage in self._stages:
            stage()
        if self._direct:
            result = tuple([tensors[base] for base in self._order])
        else:
            result = tuple([view() for view in self._out_views])
        for base, *_ in self._fresh:
            tensors[base] = None
        return result  # type: ignore[return-value]

    def _new_outputs(self) -> list[Tensor]:
        return [torch.empty_strided(size, stride, dtype=dtype) for _, size, stride, dtype in self._fresh]

    def _provide(self, outputs: Sequence[Tensor]) -> None:
        """Let the next run write its outputs there."""
        for (base, *_), tensor in zip(self._fresh, outputs):
            self._bases[base] = tensor.data_ptr()
            self._tensors[base] = tensor

    def bind(self, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """`run` with the same inputs each time, whose addresses are written down once. They keep their memory, and the
        outputs may have theirs in common: each call may overwrite what the one before returned.
        """
        if not all(isinstance(stage, Native) for stage in self._plan.stages):
            return functools.partial(self.run, inputs)
        me, outputs, stages = object(), self._new_outputs(), self._stages
        result = self._results(inputs, outputs)

        def bound() -> tuple[Tensor, ...]:
            if self._addressed is not me:
                for base, tensor in zip(self._inputs, inputs):
                    self._bases[base] = tensor.data_ptr()
                self._provide(outputs)
                self._addressed = me
            for stage in stages:
                stage()
            return result

        return bound

    def _results(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a run on these inputs returns that writes to these outputs."""
        place = {base: index for index, (base, *_) in enumerate(self._fresh)}
        if self._direct:
            return tuple([outputs[place[base]] for base in self._order])
        known = dict(zip(self._inputs, inputs)) | {base: outputs[index] for base, index in place.items()}
        for base, tensor in known.items():
            self._tensors[base] = tensor
        result = tuple([view() for view in self._out_views])
        for base in known:
            self._tensors[base] = None
        return result

    def clocked(self, inputs: Sequence[Tensor], repeats: int) -> tuple[float, list[float], list[float]]:
        """Run `repeats` times; seconds in all, and by instruction of the stream what it waited for others and ran."""
        seconds = (ctypes.c_double * (2 * len(self.stream)))()
        self.run(inputs)  # memory touched, threads awake
        self._kernels.accelc_plan_clock(self._handle, seconds)
        started = time.perf_counter()
        try:
            for _ in range(repeats):
                self.run(inputs)
        finally:
            self._kernels.accelc_plan_clock(self._handle, None)
        return time.perf_counter() - started, list(seconds[::2]), list(seconds[1::2])

    @property
    def stream(self) -> Sequence[Instruction]:
        """The native instructions in order."""
        return [instruction for instruction, _ in self._plan.stream]

    # -- stages: one closure each ------------------------------------------------------------------------------------

    def _stage(self, stage: Native | Gemm | Call) -> Callable[[], None]:
        if isinstance(stage, Native):
            return self._native(stage)
        return self._gemm(stage) if isinstance(stage, Gemm) else self._call(stage)

    def _native(self, stage: Native) -> Callable[[], None]:
        run, handle, bases, begin, end = (
            self._kernels.accelc_plan_run,
            self._handle,
            self._bases,
            stage.begin,
            stage.end,
        )

        def native() -> None:
            failed = run(handle, bases, begin, end)
            if failed:
                raise StepIndexError(FAILURES[failed], where="a compiled step")

        return native

    def _gemm(self, stage: Gemm) -> Callable[[], None]:
        x, weight, out = self._view(stage.x), self._view(stage.weight), self._view(stage.out)
        bias = None if stage.bias is None else self._view(stage.bias)

        plain = torch.mm if len(stage.x.size) == 2 else torch.bmm
        biased = torch.addmm if len(stage.x.size) == 2 else torch.baddbmm

        def gemm() -> None:
            if bias is None:
                plain(x(), weight().mT, out=out())
            else:
                biased(bias(), x(), weight().mT, out=out())

        return gemm

    def _call(self, stage: Call) -> Callable[[], None]:
        arguments = [a if isinstance(a, int) else self._view(a) for a in stage.inputs]
        outputs = [(self._plan.base_of[a.root], a) for a in stage.outputs]

        def call() -> None:
            results = stage.function(*[a if isinstance(a, int) else a() for a in arguments])
            for (base, expected), result in zip(outputs, results, strict=True):
                if result.stride() != expected.stride or result.storage_offset() != 0:
                    laid = torch.empty_strided(expected.size, expected.stride, dtype=expected.dtype)
                    result = laid.copy_(result)
                self._tensors[base] = result
                self._bases[base] = result.data_ptr()

        return call

    def _view(self, a: Array) -> Callable[[], Tensor]:
        """A torch tensor over an array: made once where the memory is ours, at each run where it is the caller's."""
        base = self._plan.base_of.get(a.root, ARENA)
        if base == ARENA:
            whole = self._arena[self._plan.base_offset[a.root] :]
            whole = whole[: whole.numel() // a.dtype.itemsize * a.dtype.itemsize].view(a.dtype)
            made = whole.as_strided(a.size, a.stride, whole.storage_offset() + a.offset)
            return lambda: made
        fixed = self._tensors[base]
        if fixed is not None:
            constant = fixed.as_strided(a.size, a.stride, a.offset)
            return lambda: constant
        tensors: list[Any] = self._tensors

        def view() -> Tensor:
            tensor: Tensor = tensors[base]
            if tensor.shape == a.size and tensor.stride() == a.stride and a.offset == 0:
                return tensor
            return tensor.as_strided(a.size, a.stride, tensor.storage_offset() + a.offset)

        return view
