"""How a product with weights in few bits is cut into tiles, and what a cut costs by arithmetic. Imports no Triton."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from accelc.ir.quantized import Scheme

from .errors import KernelConfigError
from .layout import BAND, STEP, TiledWeight, padded_columns

Mode = Literal["exact", "biased"]
TOKENS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Tile:
    """One program computes ``rows`` outputs for ``tokens`` rows of x, over 1 / ``split`` of K.

    ``warps`` of 32 threads; ``stages`` loop iterations are in flight; an iteration has ``unroll`` steps of one group or
    128 columns; ``mode`` is how the base of the codes is taken off (`accelc.codegen.gpu.kernels`). Raises
    KernelConfigError.
    """

    rows: int = 128
    tokens: int = 16
    warps: int = 4
    stages: int = 3
    unroll: int = 2
    split: int = 1
    mode: Mode = "exact"

    def __post_init__(self) -> None:
        turns = self.rows / (16 * self.warps)
        if self.rows % BAND or turns not in (1, 2) or self.tokens not in TOKENS:
            raise KernelConfigError(
                f"no such tile: {self.rows} rows, {self.tokens} tokens, {self.warps} warps", where="tile",
                remedy="rows is 16 or 32 times warps and a multiple of 64; tokens is 8, 16, 32 or 64.",
            )  # fmt: skip
        if min(self.stages, self.unroll, self.split) < 1 or self.mode not in ("exact", "biased"):
            raise KernelConfigError(f"no such tile: {self}", where="tile")

    def __str__(self) -> str:
        return (
            f"{self.rows}x{self.tokens} warps {self.warps} stages {self.stages} unroll {self.unroll} "
            f"split {self.split} {self.mode}"
        )


@dataclass(frozen=True)
class Weights:
    """What a tile depends on of a weight [``rows``, ``columns``]."""

    scheme: Scheme
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: TiledWeight) -> Weights:
        return cls(weight.scheme, weight.rows, weight.columns)

    @property
    def padded(self) -> int:
        """Columns with padding."""
        return padded_columns(self.scheme, self.columns)

    @property
    def step(self) -> int:
        """Columns of one matrix product: a group, or 128 of a longer one."""
        return min(self.scheme.group or STEP, STEP)

    @property
    def steps(self) -> int:
        """Steps along K."""
        return self.padded // self.step

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        scheme = self.scheme
        groups = self.padded // scheme.group if scheme.group else 1
        each = scheme.scale_dtype.itemsize * (1 if scheme.symmetric else 2)
        return -(-self.rows // BAND) * BAND * (self.padded * scheme.bits // 8 + groups * each)


@dataclass(frozen=True)
class Chip:
    """What the model knows of a GPU: ``bandwidth`` and ``cache_bandwidth`` (second-level cache) in bytes a second,
    ``shared`` bytes and ``registers`` (of 32 bits) of each of its ``processors``. Peak figures of the makers; measured
    tiles overrule them.
    """

    processors: int
    bandwidth: float
    cache_bandwidth: float
    shared: int
    registers: int = 65536
    warps: int = 64
    lanes: int = 32


CHIPS = {
    "sm_80": Chip(108, 1.94e12, 4.0e12, 163 * 1024),
    "sm_86": Chip(82, 0.94e12, 2.5e12, 99 * 1024, warps=48),
    "sm_89": Chip(128, 1.01e12, 4.0e12, 99 * 1024, warps=48),
    "sm_90": Chip(132, 3.35e12, 5.5e12, 227 * 1024),
    "sm_100": Chip(148, 8.0e12, 12e12, 227 * 1024),
    "sm_120": Chip(170, 1.79e12, 6.0e12, 99 * 1024, warps=48),
    "gfx942": Chip(304, 5.3e12, 10e12, 64 * 1024, 131072, 32, 64),
}
"""A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI300X. Bandwidths of second-level caches are assumptions."""
# What follows was chosen so that the first tiles are the fast ones of a sweep on an H200 (16 and 64 rows of x, int4 and
# int8); for other chips they are assumptions.
CLOCK = 1.75e9
"""Cycles a second of a processor."""
LATENCY = 2.0e-6
"""Seconds from a load's issue to its data while the memory is busy; loads in flight cover it."""
CHAIN = 300.0
"""Cycles of an iteration in which a warp waits: for its barrier, its copies and its products."""
ISSUE = 5.0
"""Cycles of a scheduler a weight and lane; what disturbs its turns is in it."""
TOKEN_ISSUE = 16.0
"""Tokens that cost one cycle more."""
START = 1.5e-6
"""Seconds until a kernel streams, and after it does."""
REPEATED = 1.25
"""How much longer a kernel takes that unpacks each weight twice (an assumption)."""
LAUNCH = 1.5e-6
"""Seconds of the kernel that adds the parts of K."""


def chip_of(target: str) -> Chip:
    """The chip of a target such as "sm_90": the nearest known one of its maker that is not newer."""
    if target.startswith("sm_"):
        known = [name for name in CHIPS if name.startswith("sm_") and int(name[3:]) <= int(target[3:])]
        return CHIPS[max(known, key=lambda name: int(name[3:]), default="sm_80")]
    return CHIPS["gfx942"]


def tokens_of(count: int, target: str) -> int:
    """Tokens of a tile for `count` rows of x: the next of 8, 16, 32, 64; more than 64 are taken 64 at a time.

    For sm_90 at least 16: only from there on does Triton take warp-group instructions, and what it takes instead was
    slower by a third for int4 on an H200.
    """
    least = 16 if target.startswith("sm_9") else TOKENS[0]
    return next((tokens for tokens in TOKENS if tokens >= max(count, least)), TOKENS[-1])


def shared_bytes(tile: Tile, weight: Weights, target: str) -> int:
    """Shared memory of a program."""
    each = tile.rows * weight.step * weight.scheme.bits // 8 + tile.tokens * weight.step * 2
    size = tile.stages * tile.unroll * each
    if target.startswith("sm_9") and sums_x(tile, weight):
        size += 16 * tile.warps * weight.step * 2  # the ones that x is multiplied by
    if not target.startswith("sm_"):
        size += tile.rows * weight.step * 2  # unpacked weights, on their way to AMD's order of registers
    return size


def sums_x(tile: Tile, weight: Weights) -> bool:
    """Whether the kernel needs the sums of x."""
    return not weight.scheme.symmetric or tile.mode == "biased"


def repeats_unpacking(tile: Tile, target: str) -> bool:
    """Whether Triton puts warps beside each other along the tokens, so that each weight is unpacked twice.

    Without warp-group instructions it doubles the warps along whichever side of the tile has more to give.
    """
    if target.startswith(("sm_9", "sm_10")) or not target.startswith("sm_"):
        return False
    down = 1
    while down < tile.warps:
        if tile.rows // 16 // down < tile.tokens // 16:
            return True
        down *= 2
    return False


def registers(tile: Tile, weight: Weights, target: str) -> int:
    """Registers of a thread, about: sums three or four times over, operands of the steps in flight, addresses."""
    threads = tile.warps * chip_of(target).lanes
    sums = (4 if sums_x(tile, weight) else 3) * tile.rows * tile.tokens / threads
    operands = tile.rows * weight.step / 2 / threads * min(tile.unroll, 2) * 0.75
    if not target.startswith(("sm_9", "sm_10")):
        operands *= 1 + tile.tokens / 64  # x too passes through registers
    return round(45 + sums + operands)


def estimate(tile: Tile, weight: Weights, count: int, target: str) -> float:
    """Seconds that a product with `count` rows of x takes, by the bytes it moves and how well loads cover latency."""
    chip, step = chip_of(target), weight.step
    blocks = -(-count // tile.tokens)
    programs = -(-weight.rows // tile.rows) * tile.split * blocks
    shared = shared_bytes(tile, weight, target)
    registers_of_program = registers(tile, weight, target) * tile.warps * chip.lanes
    resident = min(chip.shared // shared, chip.registers // registers_of_program, chip.warps // tile.warps)
    if resident < 1:
        return float("inf")
    most = -(-programs // chip.processors)  # programs of the busiest processor
    # Processors that are done leave part of their bandwidth to the others: half of the imbalance counts.
    balance = (1 + most * chip.processors / programs) / 2
    # Bytes of weights that are on their way to one processor, against what its share of the bandwidth needs.
    ahead = max(tile.stages - 1, 0.5) * tile.unroll * tile.rows * step * weight.scheme.bits / 8
    needed = LATENCY * chip.bandwidth / chip.processors
    cover = min(1.0, min(resident, most) * ahead / needed)
    read = programs * (tile.tokens * weight.padded * 2 / tile.split) + blocks * weight.nbytes
    used = min(resident, most)
    of_warp = tile.rows * step / (tile.warps * chip.lanes) * (ISSUE + tile.tokens / TOKEN_ISSUE)
    iteration = CHAIN + tile.unroll * of_warp * used * tile.warps / 4  # four schedulers a processor
    cycles = most / used * -(-weight.steps // (tile.split * tile.unroll)) * iteration
    moving = balance * max(blocks * weight.nbytes / (chip.bandwidth * cover), read / chip.cache_bandwidth)
    seconds = max(moving, cycles / CLOCK) + START
    if repeats_unpacking(tile, target):
        seconds *= REPEATED
    if tile.split > 1:
        seconds += LAUNCH + 2 * tile.split * count * weight.rows * 4 / chip.cache_bandwidth
    return seconds


def candidates(weight: Weights, count: int, target: str = "sm_90") -> list[Tile]:
    """Tiles that fit the weight, `count` rows of x and the target, best first by `estimate`."""
    chip = chip_of(target)
    steps = weight.steps
    tokens = tokens_of(count, target)
    most = 230 if target.startswith("sm_") else 150
    found: list[tuple[float, int, Tile]] = []
    shapes = ((64, 4), (128, 4), (128, 8), (256, 8))
    for (rows, warps), stages, unroll, split in itertools.product(shapes, (2, 3, 4, 6), (1, 2), (1, 2, 4, 8, 16)):
        if (split > 1 and steps < 2 * split * unroll) or rows >= 2 * max(weight.rows, BAND):
            continue
        if target.startswith("sm_10") and unroll > 1 and tokens < TOKENS[-1]:
            continue  # ptxas gives these 80 registers and spills
        for mode in modes(weight, target):
            tile = Tile(rows, tokens, warps, stages, unroll, split, mode)
            # A thread has at most 255 registers, and what does not fit is spilled. The estimate is rougher for AMD.
            if shared_bytes(tile, weight, target) <= chip.shared and registers(tile, weight, target) <= most:
                found.append((estimate(tile, weight, count, target), len(found), tile))
    if not found:
        raise KernelConfigError(f"no tile fits {weight.rows} x {weight.columns} on {target}", where="candidates")
    return [tile for _, _, tile in sorted(found)]


def modes(weight: Weights, target: str) -> tuple[Mode, ...]:
    """How the base of the codes may be taken off.

    Asymmetric weights need the sums of x anyway, so that "biased" costs nothing; and without packed instructions, on
    other chips than NVIDIA's, a subtraction is one of fp32 and two conversions. Elsewhere "exact" was the faster one
    for every matrix and number of rows on an H200: it leaves the matrix unit less to do.
    """
    return ("exact",) if weight.scheme.symmetric and target.startswith("sm_") else ("biased",)
