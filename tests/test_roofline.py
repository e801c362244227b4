"""The model of a step's time: its parts add up, and the command shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES
from typer.testing import CliRunner

import accelc
from accelc.capture import capture
from accelc.cli import app
from accelc.codegen.fusion import Fusion, partition
from accelc.ir.errors import InputError
from accelc.pipeline import step_pipeline
from accelc.roofline import Hardware, known_hardware, roofline


@pytest.fixture(scope="module")
def fusion() -> Fusion:
    return partition(step_pipeline().run(capture(FAMILIES["llama"].build(), max_length=64)))


def test_a_step_is_the_sum_of_its_regions(fusion: Fusion) -> None:
    made = roofline(fusion, "h200", batch=2, new=4, context=32)
    cost = fusion.cost.at(2, 4, 32)
    assert made.bytes == pytest.approx(cost.bytes)
    assert sum(part.count for part in made.parts) == len(fusion.regions)
    assert made.kernels == fusion.kernels
    on = made.hardware
    reading, computing, launching = cost.bytes / on.bandwidth, cost.flops / on.flops, made.kernels * on.launch
    assert max(reading, computing) + launching <= made.seconds <= reading + computing + launching
    assert 0 < made.limit < made.seconds


def test_more_is_never_faster(fusion: Fusion) -> None:
    slow = Hardware("slow", 1e6, 1e6, 0.0, "made up")
    least = roofline(fusion, slow, batch=1, new=1, context=16).seconds
    for more in ({"batch": 2}, {"new": 2}, {"context": 32}):
        assert roofline(fusion, slow, **{"batch": 1, "new": 1, "context": 16, **more}).seconds > least


def test_hardware_has_sources() -> None:
    for name, each in known_hardware().items():
        assert name == name.lower()
        assert each.source
        assert 1e11 < each.bandwidth < 2e13 < each.flops < 1e16
        assert each.bandwidth < each.flops


@pytest.mark.parametrize(
    ("options", "text"),
    [({"on": "toaster"}, "a100, b200"), ({"batch": 0}, "batch is 0"), ({"new": 1.5}, "new is 1.5"),
     ({"new": 9, "context": 8}, "holds no 9 new ones")],
)  # fmt: skip
def test_what_has_no_model_is_named(options: dict, text: str, fusion: Fusion) -> None:
    with pytest.raises(InputError, match=text):
        roofline(fusion, **options)


def test_the_command_shows_regions_and_records_them(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path)

    def run(*options: str) -> str:
        result = CliRunner().invoke(app, ["roofline", str(tmp_path), "--context", "64", *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = run("--hardware", "h100")
    assert "NVIDIA H100" in shown
    assert "modelled, not measured" in shown
    found = json.loads(run("--quantize", "int8", "--json").strip().splitlines()[-1])
    assert found["kernels"] == 13
    whole = json.loads(run("--json").strip().splitlines()[-1])
    assert found["bytes"] < 0.5 * whole["bytes"]
    failed = CliRunner().invoke(app, ["roofline", str(tmp_path), "--hardware", "abacus"])
    assert failed.exit_code == 1
    assert "unknown hardware" in failed.output


def test_a_decoders_step_is_modelled() -> None:
    decoder = accelc.compile(FAMILIES["gpt2"].build(), max_length=64, backend="eager", check="off", cache=False)
    assert roofline(decoder.programs["step"], context=64).kernels == 13
