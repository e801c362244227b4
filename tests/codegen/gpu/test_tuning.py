"""Tiles: which are offered, in which order, and how measured ones are remembered."""

from __future__ import annotations

import json

import pytest
import torch
from codegen_gpu import random_weight

from accelc.codegen.gpu import Tile, measure, tile_weight, tuning
from accelc.codegen.gpu.tiles import CHIPS, Weights, candidates, chip_of, estimate, shared_bytes, tokens_of
from accelc.ir.quantized import Scheme

GATE = Weights(Scheme.parse("int4"), 14336, 4096)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path))
    tuning._choose.cache_clear()


def test_measured_tiles_are_remembered_and_take_precedence(tmp_path) -> None:
    by_arithmetic = tuning.choose(GATE, 5, torch.bfloat16, "Some GPU", "sm_80")
    assert by_arithmetic == candidates(GATE, 5, "sm_80")[0]
    measured = Tile(64, 8, 4, 6, 1, 4, "biased")
    assert measured != by_arithmetic
    tuning.remember(GATE, 7, torch.bfloat16, "Some GPU", "sm_80", measured, 12.3456)
    assert tuning.choose(GATE, 5, torch.bfloat16, "Some GPU", "sm_80") == measured, "5 and 7 rows share tiles of 8"
    assert tuning.choose(GATE, 9, torch.bfloat16, "Some GPU", "sm_80").tokens == 16
    assert tuning.choose(GATE, 5, torch.float16, "Some GPU", "sm_80") == by_arithmetic
    assert tuning.choose(GATE, 5, torch.bfloat16, "Other GPU", "sm_80") == by_arithmetic
    (entry,) = json.loads((tmp_path / "gpu-tiles.json").read_text()).items()
    assert tuning.kernel_hash() in entry[0]
    assert entry[1]["microseconds"] == 12.346
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", ["{", "[1]", '{"key": 3'])
def test_a_damaged_database_is_announced_and_replaced(tmp_path, content: str) -> None:
    (tmp_path / "gpu-tiles.json").write_text(content)
    with pytest.warns(UserWarning, match="are not read from gpu-tiles.json"):
        tuning.choose(GATE, 5, torch.bfloat16, "GPU", "sm_80")
    with pytest.warns(UserWarning, match="gpu-tiles.json"):
        tuning.remember(GATE, 5, torch.bfloat16, "GPU", "sm_80", Tile(64, 8), 1.0)
    assert tuning.choose(GATE, 5, torch.bfloat16, "GPU", "sm_80") == Tile(64, 8)


@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize("text", ["int4", "int8", "int4:g32:asym", "int4:row"])
@pytest.mark.parametrize("count", [1, 16, 64, 100])
def test_candidates_fit_the_chip_and_are_sorted(target: str, text: str, count: int) -> None:
    shape = Weights(Scheme.parse(text), 4096, 4096)
    found = candidates(shape, count, target)
    seconds = [estimate(tile, shape, count, target) for tile in found]
    assert seconds == sorted(seconds)
    assert len(set(found)) == len(found)
    assert all(tile.tokens == tokens_of(count, target) for tile in found)
    assert all(shared_bytes(tile, shape, target) <= chip_of(target).shared for tile in found)
    floor = shape.nbytes / chip_of(target).bandwidth
    assert seconds[0] > floor, "nothing is faster than reading the weights once"


def test_narrow_matrices_are_split_and_wide_ones_are_not() -> None:
    scheme = Scheme.parse("int4")
    assert candidates(Weights(scheme, 1024, 14336), 1, "sm_90")[0].split > 1
    assert candidates(Weights(scheme, 128256, 4096), 16, "sm_90")[0].split == 1


def test_sizes_by_shape_are_those_of_the_tensors() -> None:
    for text in ("int4", "int8:g64:asym:fp32", "int4:row"):
        weight = tile_weight(random_weight(Scheme.parse(text), 70, 300, 0))
        shape = Weights.of(weight)
        assert (shape.nbytes, shape.padded) == (weight.nbytes, weight.padded)


def test_wrong_and_changing_results_are_told_from_right_ones() -> None:
    want = torch.randn(4, 64)
    right = want.to(torch.bfloat16)
    assert measure.what_is_wrong([right, right.clone()], want) == ""
    changed = right.clone()
    changed[3, 5] += 1
    assert "differ" in measure.what_is_wrong([right, changed], want)
    assert "off by" in measure.what_is_wrong([changed, changed], want)
    assert "off by nan" in measure.what_is_wrong([right * float("nan")], want)
