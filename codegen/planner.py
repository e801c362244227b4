"""A memory plan and an instruction stream for one set of sizes.

Everything that depends on sizes is settled here once: a step that runs touches no shapes and allocates only its
outputs. Instructions wait for earlier ones only where their memory overlaps in time (q, k and v projections run into
each other).
"""

from __future__ import annotations

import ctypes
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_arg

from accelc.codegen.arrays import Array
from accelc.codegen.instructions import OPS, Gemm, Instruction, Scratch, code
from accelc.codegen.quantized import with_activations
from accelc.codegen.schedule import Region, Schedule, lower, tensors_in
from accelc.ir.compat import storage_key

ALIGNMENT = 64
ARENA = 0
"""Index of the arena among the bases."""


@dataclass(frozen=True)
class Native:
    """Instructions [begin, end) of the stream."""

    begin: int
    end: int


@dataclass(frozen=True)
class Call:
    """A region without kernels. `inputs`: arrays and numbers; `outputs`: one root and expected strides each."""

    function: Callable[..., Any]
    inputs: tuple[Array | int, ...]
    outputs: tuple[Array, ...]


Stage = Native | Gemm | Call


@dataclass
class Plan:
    """What a step runs at given sizes. Roots are indices of bases: 0 the arena, then `roots` says which is whose."""

    stages: list[Stage]
    stream: list[tuple[Instruction, bool]]
    arena_bytes: int
    base_of: dict[int, int]
    base_offset: dict[int, int]
    bases: int
    inputs: list[int]
    """Base of each placeholder."""
    outputs: list[Array] = field(default_factory=list)
    fresh: dict[int, Array] = field(default_factory=dict)
    """Root -> the whole array to allocate at each run for an output."""
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    """Root -> a tensor that depends on sizes alone."""


class Roots:
    """Which memory each storage of the program has: inputs, constants and region outputs a base each, the rest the
    arena.
    """

    def __init__(self) -> None:
        self.base_of: dict[int, int] = {}
        self.count = 1

    def add(self, root: int) -> int:
        if root not in self.base_of:
            self.base_of[root] = self.count
            self.count += 1
        return self.base_of[root]


def make_array(value: torch.Tensor) -> Array:
    """Where a value lies, known from its meta tensor."""
    return Array(storage_key(value), value.dtype, value.storage_offset(), tuple(value.shape), value.stride())


def plan(
    graph: fx.Graph,
    values: Mapping[fx.Node, Any],
    order: Schedule,
    functions: Mapping[int, Callable[..., Any]],
    choose: Callable[[Instruction], Sequence[Instruction | Gemm]],
    activation_bits: int = 16,
) -> Plan:
    """Lower the schedule. `values`: of each node, at the plan's sizes; `functions`: what runs the regions, by id;
    `choose`: what runs in place of an instruction (`accelc.codegen.choice`); `activation_bits`: of the options.
    """
    memo: dict[int, Array] = {}

    def array(value: torch.Tensor) -> Array:
        if id(value) not in memo:
            memo[id(value)] = make_array(value)
        return memo[id(value)]

    roots = Roots()
    inputs = [roots.add(storage_key(values[n])) for n in graph.nodes if n.op == "placeholder"]
    constants = _constants(graph, values, order.kinds)
    for node in graph.nodes:
        if node.op == "get_attr":
            roots.add(storage_key(values[node]))
    for root in constants:
        roots.add(root)
    outputs = [array(values[n]) for n in graph.output_node().args[0]]  # type: ignore[union-attr, index]
    steps: list[Instruction | Gemm | Call] = []
    fresh: dict[int, Array] = {}
    returned = {out.root for out in outputs}
    for item in order.items:
        if isinstance(item, Region):
            given = tuple(array(v) if isinstance(v := values[n], torch.Tensor) else v for n in item.inputs)
            results = tuple(array(values[n]) for n in item.outputs)
            for result in results:
                roots.add(result.root)
            steps.append(Call(functions[id(item)], given, results))
            continue
        lowered = lower(item, values.__getitem__, array)
        assert lowered is not None, f"{item} was covered when it was scheduled"
        out = values[item]
        if isinstance(out, torch.Tensor) and storage_key(out) in returned:
            roots.add(storage_key(out))
            fresh[storage_key(out)] = array(out)
        steps += [step for ins in lowered for step in choose(with_activations(ins, activation_bits))]
    made = assemble(steps, roots)
    return replace(made, inputs=inputs, outputs=outputs, fresh=fresh, constants=constants)


def assemble(steps: Sequence[Instruction | Gemm | Call], roots: Roots) -> Plan:
    """A plan of steps over the memory that `roots` names, and what else they use."""
    placed, offsets, total = _place(list(steps), roots)
    stages, stream = _stages(placed, roots, offsets)
    return Plan(stages, stream, total, dict(roots.base_of), offsets, roots.count, [])


def _constants(graph: fx.Graph, values: Mapping[fx.Node, Any], kinds: Mapping[fx.Node, str]) -> dict[int, torch.Tensor]:
    """Root -> what a "constant" node computes, laid out as its meta tensor says."""
    real: dict[fx.Node, Any] = {}
    found: dict[int, torch.Tensor] = {}

    def value(node: fx.Node) -> Any:
        if node not in real:
            if not tensors_in(values[node]):
                return values[node]
            args, kwargs = map_arg((node.args, node.kwargs), value)
            real[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return real[node]

    for node in graph.nodes:
        if kinds[node] == "constant":
            for made, want in zip(tensors_in(value(node)), tensors_in(values[node])):
                found[storage_key(want)] = torch.empty_strided(want.shape, want.stride(), dtype=want.dtype).copy_(made)
    return found


def _touched(step: Instruction | Gemm | Call) -> tuple[list[Array], list[Array]]:
    """(read, written) arrays."""
    if isinstance(step, Gemm):
        return [a for a in (step.x, step.weight, step.bias) if a is not None], [step.out]
    if isinstance(step, Call):
        return [a for a in step.inputs if isinstance(a, Array)], list(step.outputs)
    arrays = list(enumerate(step.arrays))
    return (
        [a for i, a in arrays if a is not None and i not in step.writes],
        [a for i, a in arrays if a is not None and i in step.writes],
    )


def _extent(array: Array) -> int:
    """Bytes of the storage up to the array's last element."""
    last = sum((n - 1) * s for n, s in zip(array.size, array.stride)) if array.numel else -1
    return (array.offset + last + 1) * array.dtype.itemsize


def _place(steps: list[Any], roots: Roots) -> tuple[list[Any], dict[int, int], int]:
    """Give every storage without a base of its own a place in the arena; storages that do not live together share."""
    steps = [_name_scratch(step, index) if isinstance(step, Instruction) else step for index, step in enumerate(steps)]
    size: dict[int, int] = defaultdict(int)
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        for a in (b for side in _touched(step) for b in side):
            if a.root not in roots.base_of:
                size[a.root] = max(size[a.root], _extent(a))
                last[a.root] = index
    free: dict[int, list[int]] = defaultdict(list)
    offsets: dict[int, int] = {}
    ending: dict[int, list[int]] = defaultdict(list)
    for root, index in last.items():
        ending[index].append(root)
    total = 0
    for index, step in enumerate(steps):
        for a in (b for side in _touched(step) for b in side):
            if a.root in size and a.root not in offsets:
                need = -(-max(size[a.root], 1) // ALIGNMENT) * ALIGNMENT
                if free[need]:
                    offsets[a.root] = free[need].pop(0)  # the one longest free: least waiting for its last readers
                else:
                    offsets[a.root], total = total, total + need
        for root in ending[index]:
            free[-(-max(size[root], 1) // ALIGNMENT) * ALIGNMENT].append(offsets[root])
    return steps, offsets, total


def _name_scratch(ins: Instruction, index: int) -> Instruction:
    """A root of its own for the instruction's temporary."""
    named = tuple(replace(a, root=-2 - index) if a is not None and a.root == Scratch.ROOT else a for a in ins.arrays)
    return replace(ins, arrays=named)


def _stages(
    steps: Sequence[Any], roots: Roots, offsets: Mapping[int, int]
) -> tuple[list[Stage], list[tuple[Instruction, bool]]]:
    """Group instructions into runs, and mark those that must wait for earlier ones of their run."""
    stages: list[Stage] = []
    stream: list[tuple[Instruction, bool]] = []
    begin = 0
    read: set[Any] = set()
    written: set[Any] = set()

    def place(a: Array) -> Any:
        return ("arena", offsets[a.root]) if a.root in offsets else a.root

    for step in steps:
        if not isinstance(step, Instruction):
            if len(stream) > begin:
                stages.append(Native(begin, len(stream)))
            begin = len(stream)
            read, written = set(), set()
            stages.append(step)
            continue
        reads, writes = ({place(a) for a in side} for side in _touched(step))
        wait = bool(reads & written or writes & (read | written))
        if wait:
            read, written = set(), set()
        read |= reads
        written |= writes
        stream.append((step, wait))
    if len(stream) > begin:
        stages.append(Native(begin, len(stream)))
    return stages, stream


def encode(plan_: Plan) -> Any:
    """The words that accelc_plan_create reads."""
    words = [len(plan_.stream)]
    for ins, wait in plan_.stream:
        words += [OPS.index(ins.op), int(wait), len(ins.arrays), len(ins.ints), len(ins.floats)]
        for a in ins.arrays:
            if a is None:
                words.append(-1)
                continue
            base = plan_.base_of.get(a.root, ARENA)
            offset = a.offset * a.dtype.itemsize + (plan_.base_offset[a.root] if base == ARENA else 0)
            words += [base, code(a, ins.raw), a.ndim, offset, *a.size, *a.stride]
        words += [int(i) for i in ins.ints]
        words += [struct.unpack("q", struct.pack("d", f))[0] for f in ins.floats]
    return (ctypes.c_int64 * len(words))(*words)
