"""What a step costs at best: time of its regions and of a token on named hardware, from bytes and operations.

A region takes the longer of its bytes at the memory's bandwidth and its operations at the peak of the matrix units,
and each of its kernels a launch. The *limit* is what weights and cache take to be read, and nothing else: the ideal
that figures in the literature are shares of.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rich.console import Group
from rich.table import Table

from accelc.codegen.fusion import Fusion, partition
from accelc.codegen.fusion.costs import Numbers
from accelc.ir import Program
from accelc.ir.errors import InputError


@dataclass(frozen=True)
class Hardware:
    """``bandwidth`` of the memory in bytes a second, ``flops`` a second in bf16, seconds that a kernel of a replayed
    graph adds, and where these are from.
    """

    name: str
    bandwidth: float
    flops: float
    launch: float
    source: str

    def seconds(self, cost: Numbers, kernels: int) -> float:
        """What a region of so many kernels takes."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops) + kernels * self.launch


@functools.cache
def known_hardware() -> dict[str, Hardware]:
    """By the names that `hardware` takes."""
    found = json.loads(files("accelc").joinpath("hardware.json").read_text(encoding="utf-8"))
    return {name: Hardware(**entry) for name, entry in found.items()}


def hardware(name: str) -> Hardware:
    """Named hardware. Raises InputError, which lists the names."""
    known = known_hardware()
    if name not in known:
        raise InputError(f"unknown hardware {name!r}", remedy=f"Use one of: {', '.join(known)}.")
    return known[name]


@dataclass(frozen=True)
class Part:
    """Regions of one kind: ``count`` of them, each with ``cost``, ``kernels`` and ``seconds``."""

    name: str
    count: int
    cost: Numbers
    kernels: int
    seconds: float


@dataclass(frozen=True)
class Roofline:
    """The model of one step of ``batch`` rows and ``new`` tokens at ``context`` on ``hardware``.

    ``unfused``: launches where each operation is a kernel; ``floor``: what is moved where nothing but inputs and
    outputs leaves the chip.
    """

    hardware: Hardware
    batch: int
    new: int
    context: int
    parts: tuple[Part, ...]
    unfused: int
    floor: Numbers

    @property
    def kernels(self) -> int:
        """Launches of a step."""
        return sum(part.count * part.kernels for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(part.count * part.seconds for part in self.parts)

    @property
    def bytes(self) -> float:
        """That a step moves."""
        return sum(part.count * part.cost.bytes for part in self.parts)

    @property
    def limit(self) -> float:
        """Seconds that weights and cache take to be read."""
        return (self.floor.weights + self.floor.states) / self.hardware.bandwidth

    def record(self) -> dict[str, Any]:
        """As JSON has it; bytes, seconds."""
        return {
            "hardware": vars(self.hardware),
            "batch": self.batch,
            "new_tokens": self.new,
            "context": self.context,
            "seconds": self.seconds,
            "limit_seconds": self.limit,
            "bytes": self.bytes,
            "floor_bytes": self.floor.bytes,
            "kernels": self.kernels,
            "kernels_unfused": self.unfused,
            "regions": [{**vars(part), "cost": vars(part.cost)} for part in self.parts],
        }

    def table(self) -> Group:
        """For a terminal: the regions, and what a step takes."""
        table = Table(title=f"{self.hardware.name}: {self.batch} rows, {self.new} new tokens, context {self.context}",
                      title_justify="left")  # fmt: skip
        for heading in ("region", "count", "kernels", "KiB each", "us each", "share"):
            left = heading == "region"
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        for part in self.parts:
            share = part.count * part.seconds / self.seconds
            table.add_row(part.name, str(part.count), str(part.kernels), f"{part.cost.bytes / 1024:.1f}",
                          f"{part.seconds * 1e6:.2f}", f"{share:.1%}")  # fmt: skip
        tokens = self.batch / self.seconds
        lines = [
            f"a step: {self.seconds * 1e3:.3f} ms, {tokens:.0f} tokens/s where it yields one token a row; limit "
            f"{self.limit * 1e3:.3f} ms ({self.limit / self.seconds:.2f} of the step)",
            f"kernels: {self.kernels}, one for each operation {self.unfused}",
            f"bytes: {self.bytes / 1e6:.1f} MB, {self.bytes / self.floor.bytes:.3f} of the least "
            f"(weights {self.floor.weights / 1e6:.1f}, cache {self.floor.states / 1e6:.1f})",
            f"modelled, not measured; {self.hardware.source}",
        ]
        return Group(table, *lines)


def roofline(
    program: Program | Fusion, on: Hardware | str = "h200", *, batch: int = 1, new: int = 1, context: int = 1024
) -> Roofline:
    """Model a step program, such as ``decoder.programs["step"]``: `batch` rows of `new` tokens each (a tree's nodes are
    new tokens), of rows with `context` tokens, these included.

    Raises InputError for sizes below one, a context of fewer tokens than are new, and unknown hardware.
    """
    for name, size in (("batch", batch), ("new", new), ("context", context)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name} is {size!r}", remedy="Give an integer of at least 1.")
    if context < new:
        raise InputError(f"a context of {context} tokens holds no {new} new ones", remedy="Give a longer context.")
    chosen = on if isinstance(on, Hardware) else hardware(on)
    fusion = program if isinstance(program, Fusion) else partition(program)
    costs = {region: region.cost.at(batch, new, context) for region in fusion.regions}
    kinds = Counter((region.kind, costs[region], region.kernels) for region in fusion.regions)
    parts = tuple(
        Part(kind, count, cost, kernels, chosen.seconds(cost, kernels))
        for (kind, cost, kernels), count in kinds.items()
    )
    return Roofline(chosen, batch, new, context, parts, fusion.unfused, fusion.floor.at(batch, new, context))
