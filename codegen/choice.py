"""Which kernel multiplies many rows: ours or torch's (oneDNN's), found by measuring both on this machine.

Few rows wait for the memory and are always ours. From some rows on arithmetic counts, and it depends on the processor
who is faster: without hardware for bf16 torch's products take 4 to 5 times as long as ours, with it half. Weights in
few bits have the same choice: by their codes, or dequantized piece by piece for torch's product.

What was measured is kept on disk beside the kernels, so that a process only measures what none did before.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from accelc.codegen.arrays import Array, contiguous
from accelc.codegen.cache import cache_dir, cached, content_key
from accelc.codegen.instance import Instance
from accelc.codegen.instructions import Gemm, Instruction
from accelc.codegen.native import Library, source_text
from accelc.codegen.planner import Roots, assemble
from accelc.codegen.quantized import LANES, dequantized_pieces

log = logging.getLogger(__name__)

FEW = 4
"""Rows up to which our kernels are taken without a look."""
SMALL = 1 << 22
"""Multiplications up to which they are as well: a call of torch takes longer to begin."""
TRIAL_ROWS = 1024
"""Rows of a weight that are measured: both take time in proportion to them."""
MOST = 256
"""Rows of x that are measured at most; sizes between are measured at the next power of two."""

TRIAL = range(8)
"""Roots of a trial's inputs: the places of its arrays."""

Steps = Sequence[Instruction | Gemm]


def torchs(ins: Instruction) -> Steps | None:
    """A product of ours as torch's; None for other instructions, and where torch cannot take the layout."""
    if ins.op == "quantized_linear":
        return dequantized_pieces(ins)
    if ins.op == "linear":
        x, weight, bias, _, out = ins.arrays
    elif ins.op == "product":
        x, matrix, bias, out = ins.arrays
        weight = None if matrix is None else matrix.transposed()
    else:
        return None
    if x is not None and x.ndim > 2 and weight is not None and out is not None:
        x, weight, out = (a.batched() for a in (x, weight, out))
    return None if x is None or weight is None or out is None else [Gemm(x, weight, bias, out)]


class Choice:
    """Decides for the products of one program. `rows`: ours up to so many rows, torch's beyond; None: measured."""

    def __init__(self, rows: int | None, library: Library, threads: int) -> None:
        self._rows = rows
        self._library = library
        self._threads = threads
        self.made: dict[str, str] = {}
        """What was measured, by product: whose kernel, and how much of the other's time it takes."""

    def steps(self, ins: Instruction) -> Steps:
        """The instruction, or what torch does in its place."""
        x, out = ins.arrays[0], ins.arrays[ins.writes[0]] if ins.writes else None
        if x is None or out is None or x.ndim < 2:
            return [ins]
        other = torchs(ins)
        if other is None:
            return [ins]
        rows = x.size[-2]
        if self._rows is not None:
            return other if rows > self._rows else [ins]
        if rows <= FEW or rows * x.size[-1] * out.size[-1] <= SMALL:
            return [ins]
        if x.ndim > 2:  # one matrix each, seldom large
            return other if rows > 4 * FEW else [ins]
        return other if self._torch_is_faster(ins, rows) else [ins]

    def _torch_is_faster(self, ins: Instruction, rows: int) -> bool:
        trial = _trial(ins, min(1 << (rows - 1).bit_length(), MOST))
        name = _name(trial)
        key = content_key("choice", name, source_text(), str(self._threads))

        def measure(path: Path) -> None:
            seconds = self._seconds(trial)
            path.write_text(json.dumps({"product": name, "ours": seconds[0], "torch": seconds[1]}))
            log.info("%s: ours %.3f ms, torch's %.3f ms", name, seconds[0] * 1e3, seconds[1] * 1e3)

        found, _ = cached(cache_dir() / "choices" / f"{key}.json", measure, _read)
        ours, theirs = found
        part = min(ours, theirs) / max(ours, theirs)
        self.made[name] = f"{'torch' if theirs < ours else 'ours'}, {part:.2f} of the other's time"
        return theirs < ours

    def _seconds(self, trial: Instruction) -> tuple[float, float]:
        """The best of some turns of each, on random values."""
        inputs = {a.root: _random(a) for a in trial.arrays if a is not None and a.root in TRIAL}
        runs = [self._instance(steps, inputs) for steps in ([trial], torchs(trial) or [trial])]
        best = [float("inf")] * len(runs)
        for turn, index in itertools.product(range(5), range(len(runs))):
            started = time.perf_counter()
            runs[index].run(())
            if turn:  # the first touches memory and wakes threads
                best[index] = min(best[index], time.perf_counter() - started)
        return best[0], best[1]

    def _instance(self, steps: Steps, inputs: Mapping[int, torch.Tensor]) -> Instance:
        roots = Roots()
        for root in inputs:
            roots.add(root)
        return Instance(assemble(steps, roots), inputs, self._library, self._threads)


def _trial(ins: Instruction, rows: int) -> Instruction:
    """The same product at `rows` rows of x and TRIAL_ROWS of the weight, over memory of its own."""
    arrays: list[Array | None] = list(ins.arrays)
    columns = ins.arrays[0].size[-1]  # type: ignore[union-attr]
    into = ins.writes[0]
    rest = min(TRIAL_ROWS, ins.arrays[into].size[-1])  # type: ignore[union-attr]
    for place, a in enumerate(ins.arrays):
        if a is None or place in ins.writes[1:]:
            continue
        if place == 0:
            size: tuple[int, ...] = (rows, columns)
        elif place == into:
            size = (rows, rest)
        elif a.ndim == 1:
            size = (rest,)
        elif ins.op == "quantized_linear":
            size = (-(-rest // LANES), *a.size[1:])
        elif ins.op == "linear":
            size = (rest, columns) if place == 1 else (rows, rest)
        else:
            size = (columns, rest)
        turned = ins.op == "product" and place == 1 and a.stride[-1] != 1
        stride = (1, columns) if turned else contiguous(size)
        arrays[place] = Array(len(TRIAL) if place == into else place, a.dtype, 0, size, stride)
    for place in ins.writes[1:]:
        scratch = ins.arrays[place]
        if scratch is not None:
            given = ins.arrays[0].size[0]  # type: ignore[union-attr]
            arrays[place] = replace(scratch, size=(scratch.size[0] // given * rows,))
    return replace(ins, arrays=tuple(arrays))


def _name(trial: Instruction) -> str:
    """All that its time depends on, in a form to read: rows x columns and dtype of each array."""

    def form(a: Array | None) -> str:
        if a is None:
            return "-"
        turned = " turned" if a.ndim > 1 and a.stride[-1] != 1 else ""
        return f"{'x'.join(map(str, a.size))} {str(a.dtype).removeprefix('torch.')}{turned}"

    return f"{trial.op}({', '.join(map(form, trial.arrays))}; {', '.join(map(str, trial.ints))})"


def _random(a: Array) -> torch.Tensor:
    """Values for an array of a trial; small, so that nothing overflows."""
    count = 1 + sum((n - 1) * s for n, s in zip(a.size, a.stride))
    if a.dtype is torch.uint8:
        return torch.randint(256, (count,), dtype=torch.uint8)
    return torch.rand(count).mul_(0.01).to(a.dtype)


def _read(path: Path) -> tuple[float, float]:
    found = json.loads(path.read_text())
    try:
        return float(found["ours"]), float(found["torch"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a measurement: {error}") from error
