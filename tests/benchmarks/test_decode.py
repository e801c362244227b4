"""The benchmark's arithmetic: bytes a token, shares of the limit, ratios turn by turn, memory groups, step times."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

from decode import groups
from overhead import per_step
from peers import Peer
from plot import plot
from samples import Case, Row, Sample
from shapes import DTYPES, SHAPES, load_model, make_model


def case(**rows: Row) -> Case:
    return Case("tiny", "fp32", 4, 4, 1, bytes_per_token=1e9, rows=rows)


def row(*samples: tuple[float, float, float], lossy: bool = False, tokens: tuple[int, ...] = ()) -> Row:
    """Samples as (tokens per second, bandwidth before, after), one a turn."""
    made = [Sample(f"a/{i}", rate, 0.1, before, after) for i, (rate, before, after) in enumerate(samples)]
    return Row("x", lossy, 2.0, 1.0, made, list(tokens))


@pytest.mark.parametrize("name", ["tiny", "160m", "1b"])
def test_shape_counts_what_the_model_has(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config(32))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    read = sum(p.numel() for n, p in model.named_parameters() if shape.tied or "embed" not in n)
    cached = 10 * 2 * shape.layers * shape.kv_heads * model.config.head_dim
    assert shape.bytes_per_token("bf16", context=10) == 2 * (read + cached)
    assert shape.bytes_per_token("fp32", context=10) == 4 * (read + cached)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_made_once_and_equal_for_all(dtype: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_model(SHAPES["tiny"], dtype, 32, tmp_path / name)
    written = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    make_model(SHAPES["tiny"], dtype, 32, tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == written
    first, second = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert first.dtype == DTYPES[dtype]
    assert first.lm_head.weight is first.model.embed_tokens.weight
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_share_of_the_limit_uses_steady_samples_and_the_higher_reading() -> None:
    found = case(accelc=row((20.0, 40.0, 38.0), (60.0, 40.0, 75.0)))
    assert found.of_limit(found.rows["accelc"]) == pytest.approx(20 / 40)
    assert case(x=row((9.0, 40.0, 75.0))).of_limit(row((9.0, 40.0, 75.0))) is None
    assert case().of_limit(row((9.0, 40.0, 40.0), lossy=True)) is None


def test_ratio_is_taken_turn_by_turn_at_one_level() -> None:
    found = case(
        accelc=row((20.0, 40, 40), (36.0, 75, 75), (22.0, 40, 40)),
        other=row((10.0, 40, 40), (9.0, 40, 40), (11.0, 41, 40)),
    )
    assert found.over("other") == 2.0  # the second turn met two levels and does not count
    assert found.over("accelc") is None


def test_agreement_counts_to_the_first_difference() -> None:
    found = case(accelc=row(tokens=(1, 2, 3, 4)), other=row(tokens=(1, 2, 9, 4)), lossy=row(lossy=True))
    assert found.agreement(found.rows["other"]) == 0.5
    assert found.agreement(found.rows["lossy"]) is None


def test_groups_fit_and_hold_the_base() -> None:
    peers = {name: Peer(name, copies=copies) for name, copies in (("accelc", 2), ("a", 1), ("b", 2), ("c", 1))}
    size = SHAPES["1b"].parameters * 4
    assert groups(peers, SHAPES["1b"], "fp32", 10**15) == [["accelc", "a", "b", "c"]]
    tight = groups(peers, SHAPES["1b"], "fp32", int((4 * size + 3e9) / 0.9) + 1)
    assert tight == [["accelc", "a"], ["accelc", "b"], ["accelc", "c"]]
    assert groups({"a": Peer("a")}, SHAPES["tiny"], "fp32", 10**15) == [["a"]]


def test_steps_are_taken_apart_by_kernel_calls() -> None:
    calls = [(0.0, 2.0), (3.0, 4.0), (10.0, 12.0), (13.0, 14.0), (20.0, 21.0), (22.0, 23.0)]
    assert per_step(calls, steps=3) == [(10.0, 3.0), (10.0, 3.0)]
    with pytest.raises(ValueError, match="do not divide"):
        per_step(calls, steps=4)


def test_record_is_json_and_the_plot_shows_every_peer(tmp_path: Path) -> None:
    from dataclasses import asdict

    found = case(accelc=row((20.0, 40, 40), tokens=(1,)), other=row((10.0, 40, 40), tokens=(1,)))
    record = {"cases": [asdict(found) | {"summary": found.summary()}], "environment": {"cpu": "a processor"}}
    plot(json.loads(json.dumps(record)), tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 1000
    assert len(found.table().rows) == 2
