"""The benchmark's arithmetic and its files: bytes a token, shares of the limit, ratios, memory groups, step times."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

from decode import groups, measure_group, unused, write
from overhead import per_step
from peers import Job, Peer
from rich.console import Console
from samples import Case, Row, Sample
from shapes import DTYPES, SHAPES, load_model, make_model
from worker import Start, WorkerError

from accelc.demo.contenders import Timed


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


def test_files_show_every_peer_and_overwrite_nothing(tmp_path: Path) -> None:
    found = case(accelc=row((20.0, 40, 40), tokens=(1,)), other=row((10.0, 40, 40), tokens=(1,)))
    environment = {"cpu": "a processor", "capability": "AVX2", "versions": {}, "commit": "abc1234", "dirty": False}
    record = {"environment": environment | {"command": "python decode.py"}}
    for _ in range(2):
        write([found], record, tmp_path, Console(quiet=True))
    names = {f"decode-tiny-fp32-abc1234{suffix}" for suffix in ("", "-2")}
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.{e}" for n in names for e in ("json", "md", "svg")}
    for name in names:
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert [list(c["summary"]) for c in written["cases"]] == [["accelc", "other"]]
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000


def test_files_are_named_by_shapes_then_types(tmp_path: Path) -> None:
    cases = [Case(shape, dtype, 4, 4, 1, 1e9) for shape in ("160m", "1b") for dtype in ("fp32", "bf16")]
    assert unused(tmp_path, cases, "abc1234") == tmp_path / "decode-160m-1b-fp32-bf16-abc1234.json"


def test_a_peer_that_fails_in_a_turn_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on, and the reason is told."""
    calls: list[str] = []

    class Scripted:
        def __init__(self, name: str, *_: object) -> None:
            self.name = name

        def __enter__(self) -> "Scripted":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def start(self, *_: object) -> Start:
            return Start(1.0, 0.5)

        def generate(self, *_: object) -> Timed:
            calls.append(self.name)
            if calls.count(self.name) == 2 and self.name == "weak":
                raise WorkerError("weak", "out of breath")
            return Timed((1, 2), 0.5, 1.5)

        def share_of_limit(self, context: int, step_bytes: float) -> float:
            assert self.name == "accelc"
            return 0.9

        def close(self) -> None:
            calls.append(f"{self.name} closed")

    class Meter:
        def read(self) -> float:
            return 40e9

    monkeypatch.setattr("decode.Worker", Scripted)
    monkeypatch.setattr("decode.time.sleep", lambda _: None)
    found = case()
    peers = {name: Peer(name) for name in ("accelc", "weak")}
    job = Job(Path(), SHAPES["tiny"], "fp32", 8, 1, Path())
    measure_group(found, job, peers, torch.ones(1, 4), 3, Meter(), Console(quiet=True))
    assert calls == ["accelc", "weak", "accelc", "weak", "weak closed", "accelc", "accelc closed"]
    assert found.skipped == {"weak": "out of breath"}
    assert [len(found.rows[name].samples) for name in peers] == [3, 1]
    assert found.rows["accelc"].cold_start == 1.5
    assert found.rows["accelc"].step_of_limit == 0.9
