"""The order of the matrix instruction's registers, against its definition written out lane by lane."""

from __future__ import annotations

import pytest
import torch
from codegen_gpu import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from accelc.codegen.gpu import tile_weight, untile_weight
from accelc.codegen.gpu.errors import KernelInputError
from accelc.codegen.gpu.layout import pack_units, padded_columns, unit_columns, unpack_units
from accelc.ir.quantized import BITS, GROUPS, SCALES, Scheme

SCHEMES = st.builds(
    Scheme, st.sampled_from(BITS), st.sampled_from(GROUPS), st.booleans(), st.sampled_from([*SCALES.values()])
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SCHEMES, st.integers(1, 200), st.integers(1, 700), st.integers(0, 99))
def test_tiling_is_undone_exactly(scheme: Scheme, rows: int, columns: int, seed: int) -> None:
    weight = random_weight(scheme, rows, columns, seed)
    back = untile_weight(tile_weight(weight))
    assert (back.scheme, back.rows, back.columns) == (scheme, rows, columns)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert torch.equal(back.scale_matrix, weight.scale_matrix)
    assert torch.equal(back.zero_matrix, weight.zero_matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_unit_is_a_bijection(bits: int, group: int) -> None:
    scheme = Scheme(bits, group)
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(scheme.levels, (128, 256), generator=g, dtype=torch.uint8)
    packed = pack_units(codes, scheme)
    assert packed.numel() * 16 == codes.numel() * bits
    assert torch.equal(unpack_units(packed, scheme), codes)


@pytest.mark.parametrize("text", ["int4", "int4:g32", "int8"])
def test_a_lane_holds_its_part_of_the_first_operand(text: str) -> None:
    """PTX ISA, matrix fragments of mma.m16n8k16 and wgmma.m64nNk16 with 16-bit elements: register r of lane l holds the
    row l / 4 + 8 (r % 2), the columns 2 (l % 4) + {0, 1} + 8 (r / 2); warp w has the rows from 16 w on.
    """
    scheme = Scheme.parse(text)
    codes = torch.arange(64 * 64).view(64, 64).remainder(scheme.levels * 31).remainder(scheme.levels).to(torch.uint8)
    codes = codes[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    wide = unit_columns(scheme)
    units = pack_units(codes, scheme)[0].view(64 // wide, 4, 32, -1)  # unit, warp, lane, elements of a lane
    mask = scheme.levels - 1
    for unit, warp, lane in ((0, 0, 0), (0, 1, 5), (64 // wide - 1, 3, 31), (0, 2, 18)):
        elements = [int(e) & 0xFFFF for e in units[unit, warp, lane]]
        held = []  # by block of 16 columns, register, half
        words = [(elements[i], elements[i + 1]) for i in range(0, len(elements), 2)]
        if scheme.bits == 4:  # a word is a block: code j of both halves is register j
            held = [[(lo >> 4 * j & mask, hi >> 4 * j & mask) for j in range(4)] for lo, hi in words]
        else:  # two words are a block: code j of word i is register 2 i + j
            for first, second in zip(words[::2], words[1::2]):
                held.append([(lo >> 8 * j & mask, hi >> 8 * j & mask) for lo, hi in (first, second) for j in range(2)])
        assert len(held) == wide // 16
        for block, registers in enumerate(held):
            for r, pair in enumerate(registers):
                row = 16 * warp + lane // 4 + 8 * (r % 2)
                column = unit * wide + 16 * block + 2 * (lane % 4) + 8 * (r // 2)
                assert pair == (int(codes[row, column]), int(codes[row, column + 1]))


def test_padding_has_scale_zero_and_sizes_are_whole_steps() -> None:
    weight = tile_weight(random_weight(Scheme.parse("int4:g32:asym"), 70, 200, 0))
    assert padded_columns(weight.scheme, 200) == 256
    assert weight.codes.shape == (2, 8, 512)
    assert weight.scales.shape == weight.zeros.shape == (2, 8, 64)
    assert int(weight.scales[:, 7].abs().sum()) == 0
    assert weight.nbytes == 128 * (256 // 2 + 8 * 4)


def test_weights_of_several_matrices_are_refused() -> None:
    with pytest.raises(KernelInputError, match="3 dims"):
        tile_weight(random_weight(Scheme(4, 32), 16, 32, 0, 2))
