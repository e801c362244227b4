"""The PTX that unpacks codes, executed instruction by instruction in Python: no GPU runs it here, and Triton's
interpreter takes plain operations in its place. Both must give the same floats in the same registers.
"""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

from accelc.codegen.gpu import kernels

WORDS = [0x00000000, 0xFFFFFFFF, 0x76543210, 0x89ABCDEF, 0x80007FFF, 0x0F0F8070, 0x13579BDF, 0xA5C3E1F0]


def as_bf16(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def bf16_bits(value: float) -> int:
    bits = int(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).view(torch.int16)) & 0xFFFF
    assert as_bf16(bits) == value, "every sum here is exact"
    return bits


def as_fp16(bits: int) -> float:
    return float(np.array(bits, dtype=np.uint16).view(np.float16))


def halves(word: int) -> tuple[int, int]:
    return word & 0xFFFF, word >> 16


def lop3(a: int, b: int, c: int, table: int) -> int:
    """PTX ISA: bit i of the table is the result where (a, b, c) are the bits of i, a the highest."""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, default mode, without replicated signs: nibble i of the selector picks byte i of b:a."""
    source = (b << 32 | a).to_bytes(8, "little")
    assert not selector & 0x8888
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


def run(text: str, outputs: int, word: int) -> list[int]:
    """The output registers of an inline assembly block for an input register."""
    registers: dict[str, int] = {f"${outputs}": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in text.strip().strip("{}").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        opcode, rest = line.split(" ", 1)
        target, *sources = re.split(r",\s*", rest)
        a = [value(s) for s in sources]
        if opcode == "mov.b32":
            result = a[0]
        elif opcode == "shr.u32":
            result = a[0] >> a[1]
        elif opcode == "lop3.b32":
            result = lop3(*a)
        elif opcode == "prmt.b32":
            result = prmt(*a)
        elif opcode == "fma.rn.bf16x2":
            parts = [as_bf16(x) * as_bf16(y) + as_bf16(z) for x, y, z in zip(*map(halves, a))]
            result = bf16_bits(parts[0]) | bf16_bits(parts[1]) << 16
        elif opcode == "sub.rn.f16x2":
            parts = [as_fp16(x) - as_fp16(y) for x, y in zip(*map(halves, a))]
            result = sum(int(np.float16(p).view(np.uint16)) << 16 * i for i, p in enumerate(parts))
        else:
            raise AssertionError(f"an instruction that this test does not know: {line}")
        registers[target] = result
    return [registers[f"${i}"] for i in range(outputs)]


def floats(word: int, dtype: str) -> tuple[float, float]:
    read = as_bf16 if dtype == "BF16" else as_fp16
    low, high = halves(word)
    return read(low), read(high)


@pytest.mark.parametrize("word", WORDS, ids=hex)
@pytest.mark.parametrize("dtype", ["BF16", "FP16"])
def test_int4(word: int, dtype: str) -> None:
    base = [128, 128, 128, 128] if dtype == "BF16" else [1024, 64, 1024, 64]
    codes = [tuple(half >> 4 * j & 15 for half in halves(word)) for j in range(4)]
    left = run(getattr(kernels, f"_INT4_{dtype}").value, 4, word)
    exact = run(getattr(kernels, f"_INT4_{dtype}_EXACT").value, 4, word)
    for j in range(4):
        assert floats(left[j], dtype) == tuple(base[j] + q for q in codes[j])
        assert floats(exact[j], dtype) == tuple(q - 8 for q in codes[j])


@pytest.mark.parametrize("word", WORDS, ids=hex)
@pytest.mark.parametrize("dtype", ["BF16", "FP16"])
def test_int8(word: int, dtype: str) -> None:
    codes = [tuple(half >> 8 * j & 255 for half in halves(word)) for j in range(2)]
    exact = run(getattr(kernels, f"_INT8_{dtype}_EXACT").value, 2, word)
    for j in range(2):
        assert floats(exact[j], dtype) == tuple(q - 128 for q in codes[j])
    if dtype == "FP16":
        left = [floats(v, dtype) for v in run(kernels._INT8_FP16.value, 2, word)]
        assert left == [tuple(1024 + q for q in pair) for pair in codes]
    else:
        low0, low1, top0, top1 = (floats(v, dtype) for v in run(kernels._INT8_BF16.value, 4, word))
        assert [tuple(map(sum, zip(low0, top0))), tuple(map(sum, zip(low1, top1)))] == [
            tuple(q - 128 for q in pair) for pair in codes
        ]


def test_a_wrong_table_is_seen() -> None:
    """Negative control: with `or` exchanged for `and` in one instruction the floats differ."""
    text = kernels._INT4_BF16.value.replace("0xea", "0xa8", 1)
    assert run(text, 4, 0x76543210) != run(kernels._INT4_BF16.value, 4, 0x76543210)
