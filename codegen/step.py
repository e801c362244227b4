"""compile_program: a step program to a callable that runs at the speed of the memory, with next to no overhead.

What runs is a list of instructions over planned memory, executed by our kernels in one parallel section a step
(codegen/cpu); operations without a kernel run in regions between, by calls of torch or compiled by Inductor. Chosen
over compiling the whole step with AOTInductor, which was measured at 24 s (one token) and 33 s (many) for 16 Llama
layers, because every layer's calls are compiled again; here a program of known operations needs no compiler at all, and
a second process only reads the library.
"""

from __future__ import annotations

import functools
import operator
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
import torch.fx as fx
from torch import Tensor

from accelc.codegen import native
from accelc.codegen.choice import Choice
from accelc.codegen.errors import StepInputError
from accelc.codegen.instance import Instance
from accelc.codegen.options import Options, Report
from accelc.codegen.pages import PageExchange
from accelc.codegen.planner import make_array, plan
from accelc.codegen.profile import Profile, summarize
from accelc.codegen.regions import Regions
from accelc.codegen.schedule import Schedule, schedule
from accelc.codegen.shapes import Dims, propagate
from accelc.codegen.symbolic import SymbolicValues
from accelc.ir.compat import storage_key
from accelc.ir.shapes import SHAPES

PAGES_SHARE = 0.25
"""Time for huge pages after each step, as a share of the step's own: some hundred steps later all are there."""
PAGES_AT_ONCE = 64 << 20
"""Weights of at most so many bytes get their huge pages when the step is made, in some 50 ms."""


def step_dims(gm: fx.GraphModule) -> dict[str, Dims]:
    """The varying dims of a step program: [B, N, ...] where an input has an entry a new token, [B, ...] elsewhere."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    return {n: {0: "B", 1: "N"} if "N" in SHAPES.get(n, ()) else {0: "B"} for n in names}


class CompiledStep:
    """A compiled program: call it with the inputs, states included; it mutates the states and returns the outputs.

    Inputs must be contiguous CPU tensors with the dtypes and fixed sizes of the examples; varying sizes may be any
    (instructions and memory are planned once for each combination of sizes, when first met). Weights are read where
    they are, by reference. One call at a time runs; others wait. `report` says what was compiled.
    """

    def __init__(
        self, gm: fx.GraphModule, examples: Sequence[Tensor], dims: Mapping[str, Dims], options: Options
    ) -> None:
        self._gm = gm
        self._options = options
        self._names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
        if len(examples) != len(self._names):
            raise StepInputError(f"{len(examples)} example inputs for a program of {len(self._names)}: {self._names}")
        self._examples = [torch.empty_like(t, device="meta") for t in examples]
        self._dims = [dims.get(name, {}) for name in self._names]
        # Where to read each varying size at a call.
        self._read = {name: (i, d) for i, named in reversed(list(enumerate(self._dims))) for d, name in named.items()}
        self._readers = tuple(self._read.values())
        self._instances: OrderedDict[tuple[int, ...], Instance] = OrderedDict()
        self._passed: dict[tuple[int, ...], list[weakref.ref[Tensor]]] = {}
        self._lock = threading.Lock()
        self.report = Report()
        self._threads = options.threads or torch.get_num_threads()
        self._pages: PageExchange | None = None  # as long as some are left
        symbolic = SymbolicValues(gm, self._examples, self._dims)
        self._regions = Regions(options, self.report, symbolic)
        started = time.perf_counter()
        if options.mode == "compile":
            self._library = native.library(options.march)
            self._choice = Choice(options.gemm_rows, self._library, self._threads)
            self.report.count(self._library.cached)
            self.report.add_seconds("kernels", time.perf_counter() - started)
            self._instance(self._sizes(examples))
            if options.huge_pages:
                self._pages = PageExchange(self._weights())
                self._exchange(0.0)
        else:
            self.report.notices.append("interpreted node by node, because mode='interpret' was asked for")

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one step. Raises `StepInputError`, `StepIndexError`."""
        if len(inputs) != len(self._names):
            self._refuse_count(inputs)
        with self._lock:
            sizes = tuple([inputs[i].shape[d] for i, d in self._readers])
            self._check(inputs, sizes)
            if self._options.mode == "interpret":
                return self.interpret(*inputs)
            instance = self._instances.get(sizes)
            if instance is None:
                instance = self._instance(sizes)
            else:
                self._instances.move_to_end(sizes)
            if self._pages is None:
                return instance.run(inputs)
            started = time.perf_counter()
            result = instance.run(inputs)
            self._exchange(PAGES_SHARE * (time.perf_counter() - started))
            return result

    def bind(self, *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """A call with the same inputs again and again, which are checked now and must not be resized: for a loop that
        writes into them. What a call returns, the next may overwrite. Raises `StepInputError`; the call raises
        `StepIndexError`.
        """
        if len(inputs) != len(self._names):
            self._refuse_count(inputs)
        if self._options.mode == "interpret":
            return functools.partial(self, *inputs)
        with self._lock:
            sizes = self._sizes(inputs)
            self._check(inputs, sizes)
            instance = self._instances.get(sizes) or self._instance(sizes)
            self._instances.move_to_end(sizes)
            bound = instance.bind(inputs)

        def call() -> tuple[Tensor, ...]:
            with self._lock:
                if self._pages is None:
                    return bound()
            return self(*inputs)  # huge pages are still to be put under the weights

        return call

    def profile(self, *inputs: Tensor, repeats: int = 20) -> Profile:
        """Where the time of a step goes, by kinds of instruction: runs it `repeats` times on the same inputs, which
        writes the same cache slots each time. Raises `StepInputError`, `StepIndexError`, and `ValueError` for a
        program that is interpreted.
        """
        if self._options.mode == "interpret":
            raise ValueError("an interpreted program has no instructions to profile; compile it with mode='compile'")
        self(*inputs)  # checks the inputs and makes the plan
        with self._lock:
            instance = self._instances[self._sizes(inputs)]
            total, waited, ran = instance.clocked(inputs, repeats)
        lengths = inputs[self._names.index("lengths")] if "lengths" in self._names else None
        committed = None if lengths is None else int(lengths.sum()) // max(len(lengths), 1)
        return summarize(instance.stream, total, waited, ran, repeats, committed)

    def settle(self) -> None:
        """Do now what else is spread over the first steps: put huge pages under all weights."""
        with self._lock:
            if self._pages is not None:
                self._pages.finish()
                self._exchange(0.0)

    def interpret(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same program, node by node in torch: the reference."""
        with torch.no_grad():
            result: tuple[Tensor, ...] = fx.Interpreter(self._gm).run(*inputs)
        return tuple(result)

    # -- off the hot path --------------------------------------------------------------------------------------------

    def _exchange(self, seconds: float) -> None:
        """Go on putting huge pages under the weights; small ones get theirs at once."""
        assert self._pages is not None
        if self._pages.total <= PAGES_AT_ONCE:
            self._pages.finish()
        else:
            self._pages.advance(seconds)
        self.report.huge_page_bytes = self._pages.done
        if not self._pages.pending:
            self._pages = None

    def _weights(self) -> list[Tensor]:
        """Constants large enough for a huge page to matter, or neighbours of such."""
        constants = [_attribute(self._gm, str(n.target)) for n in self._gm.graph.nodes if n.op == "get_attr"]
        return [t for t in constants if t.untyped_storage().nbytes() >= 1 << 16]

    def _sizes(self, inputs: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(inputs[i].shape[d] for i, d in self._readers)

    def _refuse_count(self, inputs: Sequence[Tensor]) -> NoReturn:
        raise StepInputError(f"{len(inputs)} inputs for a step of {len(self._names)}: {', '.join(self._names)}")

    def _check(self, inputs: Sequence[Tensor], sizes: tuple[int, ...]) -> None:
        """Raise `StepInputError` unless the inputs fit. Objects that passed at these sizes are not looked at again."""
        passed = self._passed.get(sizes)
        if passed is None:
            for i, tensor in enumerate(inputs):
                self._check_one(i, tensor, sizes)
            self._passed[sizes] = [weakref.ref(tensor) for tensor in inputs]
            return
        for i, (ref, tensor) in enumerate(zip(passed, inputs)):
            if ref() is not tensor:  # an identity alone would not do: ids are reused
                self._check_one(i, tensor, sizes)
                passed[i] = weakref.ref(tensor)

    def _check_one(self, index: int, value: Tensor, sizes: tuple[int, ...]) -> None:
        name, example, named = self._names[index], self._examples[index], self._dims[index]
        shape = list(example.shape)
        if named:
            given = dict(zip(self._read, sizes))
            for dim, size in named.items():
                shape[dim] = given[size]
        if list(value.shape) != shape or value.dtype != example.dtype:
            raise StepInputError(
                f"{name} is {list(value.shape)} {value.dtype}, not {shape} {example.dtype}",
                where="inputs of a compiled step",
                remedy="Compile the program for these inputs, or convert them.",
            )
        if not value.is_contiguous() or value.device.type != "cpu":
            raise StepInputError(
                f"{name} is not a contiguous tensor on the CPU",
                where="inputs of a compiled step",
                remedy=f"Pass {name}.contiguous(); allocate a state contiguously, as it is written in place.",
            )

    def _instance(self, sizes: tuple[int, ...]) -> Instance:
        """Plan for these sizes."""
        graph, given = self._gm.graph, dict(zip(self._read, sizes))
        started = time.perf_counter()
        values = propagate(self._gm, self._examples, self._dims, given)
        order = schedule(graph, values, make_array)
        self.report.add_seconds("analysis", time.perf_counter() - started)
        started = time.perf_counter()
        functions, inductor = {}, set()
        for region in order.regions():
            functions[id(region)], compiled = self._regions.compile(region, given)
            inductor |= set(region.nodes if compiled else ())
        self.report.add_seconds("regions", time.perf_counter() - started)
        started = time.perf_counter()
        made = plan(graph, values, order, functions, self._choice.steps, self._options.activation_bits)
        self.report.products = dict(self._choice.made)
        constants = {
            storage_key(values[n]): _attribute(self._gm, str(n.target)) for n in graph.nodes if n.op == "get_attr"
        }
        instance = Instance(made, constants, self._library, self._threads)
        self._instances[sizes] = instance
        if len(self._instances) > self._options.instances:
            self._passed.pop(self._instances.popitem(last=False)[0], None)
        self.report.add_seconds("plans", time.perf_counter() - started)
        self._count(given, order, inductor)
        return instance

    def _count(self, given: dict[str, int], order: Schedule, inductor: set[fx.Node]) -> None:
        counts: dict[str, Counter[str]] = {"native": Counter(), "eager": Counter(), "inductor": Counter()}
        for node, kind in order.kinds.items():
            if kind in ("native", "foreign") and node.target is not operator.getitem:
                name = "native" if kind == "native" else "inductor" if node in inductor else "eager"
                counts[name][str(node.target)] += 1
        for name, counter in counts.items():
            setattr(self.report, name, getattr(self.report, name) | counter)
        self.report.plans.append(given)
        self.report.regions = max(self.report.regions, len(order.regions()))


def _attribute(gm: fx.GraphModule, path: str) -> Tensor:
    value = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value.detach()  # type: ignore[operator, return-value]


def compile_program(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    dynamic: Mapping[str, Dims] | None = None,
    options: Options | None = None,
) -> CompiledStep:
    """Compile a program for CPUs.

    `gm`: a graph over aten and the accelc dialect that mutates inputs through accelc::cache_update alone; parameters as
    get_attr, read by reference (tied ones stay shared). `example_inputs`: one tensor per placeholder, of which shape
    and dtype count. `dynamic`: which dims of which placeholder vary, by name of the size; default `step_dims(gm)`.
    Sizes of one name agree. Raises `ToolchainError`, `MutationError`, `ShapeError`.
    """
    return CompiledStep(gm, example_inputs, step_dims(gm) if dynamic is None else dynamic, options or Options())
