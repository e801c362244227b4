"""What a compiled kernel consists of: registers, spills, and the instructions of its main loop.

NVIDIA's cubins are taken apart with nvdisasm and cuobjdump, which come inside the triton package; of AMD's kernels the
metadata and the text of the assembly are read, which Triton keeps.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

from .errors import DisassemblyError

KINDS: dict[str, str] = {
    "matrix": r"[HIQ]G?MMA|UTC\w*MMA\w*|v_mfma\w*|v_smfmac\w*",
    "unpack": r"LOP3|SHF|PRMT|HFMA2|HADD2|v_(?:and|or|or3|lshr|lshl|lshrrev|lshlrev|perm|bfe|bfi|pk)_\w*",
    "scale": r"FFMA2?|FMUL2?|FADD2?|v_(?:pk_)?(?:fma|mul|add|sub|mac|fmac)_f32\w*",
    "load": (
        r"LDG|LDGSTS|LDGDEPBAR|LDS|LDSM|LDTM|STS|STSM|STTM|STG|UTMALDG|UBLKCP|"
        r"(?:global|buffer|flat|s)_(?:load|store)\w*|ds_\w+"
    ),
    "wait": (
        r"BAR|DEPBAR|MEMBAR|FENCE|WARPGROUP|WARPSYNC|SYNCS|ERRBAR|CCTL|NOP|NANOSLEEP|"
        r"s_waitcnt\w*|s_barrier|s_nop"
    ),
}
"""Opcodes by what they are for; all others move addresses, constants and the loop along."""


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, each its opcode with what it does; ``products`` counts matrix instructions."""

    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in it."""
        return Counter(self.instructions)

    @property
    def products(self) -> int:
        """Matrix instructions."""
        return self.kinds()["matrix"]

    def kinds(self) -> dict[str, int]:
        """Instructions by what they are for: the keys of KINDS, and "rest"."""
        counts = dict.fromkeys([*KINDS, "rest"], 0)
        for opcode, count in self.opcodes.items():
            kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, opcode)), "rest")
            counts[kind] += count
        return counts


@dataclass(frozen=True)
class Usage:
    """``registers`` a thread, ``spills`` (instructions that move registers to local memory and back), ``stack`` bytes a
    thread, and the ``loop`` with the most matrix instructions (None: there is no such loop).
    """

    registers: int
    spills: int
    stack: int
    loop: Loop | None = field(repr=False)


def of_cubin(cubin: bytes) -> Usage:
    """The usage of a cubin with one kernel. Raises DisassemblyError."""
    text = disassemble(cubin)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", _tool("cuobjdump", cubin, "-res-usage"))
    if found is None:
        raise DisassemblyError("cuobjdump prints no register count")
    body, labels = _parse(text)
    spills = sum(opcode in ("LDL", "STL") for opcode, _ in body)
    return Usage(int(found[1]), spills, int(found[2]), _main_loop(body, labels, r"BRA\w*"))


def disassemble(cubin: bytes) -> str:
    """The assembly of a cubin."""
    return _tool("nvdisasm", cubin, "-c")


def of_amdgcn(text: str) -> Usage:
    """The usage of a kernel from the assembly that Triton keeps under "amdgcn". Raises DisassemblyError."""
    values = {}
    for name in ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise DisassemblyError(f"the assembly has no metadata {name!r}")
        values[name] = int(found[1])
    body, labels = _parse_gcn(text)
    # vgpr_count includes the accumulation registers.
    return Usage(
        values["vgpr_count"], values["vgpr_spill_count"] + values["sgpr_spill_count"],
        values["private_segment_fixed_size"], _main_loop(body, labels, r"s_c?branch\w*"),
    )  # fmt: skip


def _tool(name: str, cubin: bytes, *options: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run([str(path), *options, file.name], capture_output=True, text=True, check=False)
        except OSError as error:
            raise DisassemblyError(f"{name} does not run: {error}", where=str(path)) from error
    if done.returncode:
        raise DisassemblyError(f"{name} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def _parse(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Opcodes with operands of nvdisasm's output, and the index that each label stands before."""
    body: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_[\w$]+):", line):
            labels[label[1]] = len(body)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);", line):
            body.append((found[2], (found[1] or "") + found[3]))
    return body, labels


def _parse_gcn(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    body: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        code = line.split(";")[0]
        if label := re.match(r"(\.\w+):", code):
            labels[label[1]] = len(body)
        elif found := re.match(r"\s+([a-z]\w+)\s*(.*)", code):
            body.append((found[1], found[2]))
    return body, labels


def _main_loop(body: list[tuple[str, str]], labels: dict[str, int], branch: str) -> Loop | None:
    """The innermost loop with the most matrix instructions."""
    loops = []
    for end, (opcode, operands) in enumerate(body):
        if not re.fullmatch(branch, opcode):
            continue
        for target in re.findall(r"\.[\w$]+", operands):
            begin = labels.get(target, end + 1)
            # Slow paths, such as that of waiting for a barrier, lie behind the kernel's end and jump back: no loops.
            if begin <= end and not any(name == "EXIT" and "@" not in rest for name, rest in body[begin:end]):
                loops.append(Loop(tuple(name for name, _ in body[begin : end + 1])))
    with_products = [loop for loop in loops if loop.products]
    return max(with_products, key=lambda loop: (loop.products, -len(loop)), default=None)
