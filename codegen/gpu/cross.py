"""Compiles Triton kernels for GPUs that this machine does not have, and says what they use.

report = compile_for(kernel, "sm_90", {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 128}, divisible=["x_ptr"])
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import sass
from .errors import CrossCompileError
from .tiles import chip_of

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300X."""
DIVISIBLE = 16
"""Of pointers and sizes that are hinted: what the JIT would see at run time."""


@dataclass(frozen=True)
class Report:
    """What one kernel uses on one ``target``.

    ``registers`` a thread; ``spills``, instructions that spill (bytes of stack in ``stack``); ``shared`` bytes of a
    program; ``occupancy``, resident warps as a part of what a processor holds; ``loop``, the main loop's instructions;
    ``in_flight``, asynchronous products that are not waited for at once: registers of their operands may be written
    anew while they run.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    occupancy: float
    loop: sass.Loop | None
    in_flight: int

    def per_weight(self, weights: float) -> float:
        """Instructions of the main loop a weight, if a thread takes `weights` of them in it. Raises CrossCompileError
        where there is no loop.
        """
        if self.loop is None:
            raise CrossCompileError(f"{self.kernel} has no loop with matrix instructions", where=self.target)
        return len(self.loop) / weights


def gpu_target(name: str) -> GPUTarget:
    """The target of a name such as "sm_90" or "gfx942". Raises CrossCompileError."""
    if found := re.fullmatch(r"sm_(\d+)a?", name):
        return GPUTarget("cuda", int(found[1]), 32)
    if re.fullmatch(r"gfx9\w+", name):
        return GPUTarget("hip", name, 64)
    raise CrossCompileError(f"no such target: {name!r}", where=name)


def compile_for(
    kernel: Any,
    target: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    divisible: Iterable[str] = (),
    warps: int = 4,
    stages: int = 3,
) -> Report:
    """Compile a kernel (`@triton.jit`) for a target.

    ``types``: Triton's names of argument types ("*bf16", "i32"); ``constants``: compile-time arguments, and arguments
    that are None; ``divisible``: arguments that are multiples of 16, without which accesses become scalar.

    Raises CrossCompileError, which names the kernel and the target.
    """
    names = kernel.arg_names
    missing = [name for name in names if name not in types and name not in constants]
    if missing:
        raise CrossCompileError(f"{kernel.__name__} needs types for {', '.join(missing)}", where=target)
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", DIVISIBLE]] for name in divisible if name not in constants},
    )
    gpu = gpu_target(target)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    try:
        made = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whatever Triton, LLVM or ptxas raise, most of it RuntimeError
        raise CrossCompileError(f"{kernel.__name__} does not compile for {target}: {error}", where=target) from error
    usage = sass.of_cubin(made.asm["cubin"]) if gpu.backend == "cuda" else sass.of_amdgcn(made.asm["amdgcn"])
    return Report(
        kernel.__name__, target, warps, usage.registers, usage.spills, usage.stack, made.metadata.shared,
        occupancy(target, warps, usage.registers, made.metadata.shared), usage.loop,
        products_in_flight(made.asm.get("ttgir", "")),
    )  # fmt: skip


def products_in_flight(ttgir: str) -> int:
    """Asynchronous matrix products in Triton's last representation that no wait for all of them follows at once."""
    # Each product, as "", and each wait, as how many products it lets run on.
    events = re.findall(r"\bwarp_group_dot\b|\bwarp_group_dot_wait\b.*pendings = (\d+)", ttgir)
    return sum(event == "" and after != "0" for event, after in itertools.pairwise([*events, ""]))


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Resident warps as a part of what a processor holds, by registers, shared memory and warps.

    Registers of a warp are allotted 256 at a time on NVIDIA's chips; each program takes 1 KiB of shared memory more.
    """
    chip = chip_of(target)
    if target.startswith("sm_"):
        of_warp = -(-registers * 32 // 256) * 256
        programs = min(chip.registers // (of_warp * warps), chip.shared // (shared + 1024), chip.warps // warps)
    else:
        # Four SIMDs of 512 registers a lane; a wave takes them eight at a time.
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        programs = min(waves // warps, chip.shared // shared if shared else waves)
    return programs * warps / chip.warps
