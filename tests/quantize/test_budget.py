"""Plans: schemes chosen by measured sensitivity, within a size or a loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES

from accelc.capture import capture
from accelc.ir import Program
from accelc.ir.errors import InputError
from accelc.ir.quantized import Scheme
from accelc.passes import Pipeline
from accelc.passes.quantize.budget import QuantizationPlan, plan_quantization
from accelc.passes.quantize.calibration import Calibration
from accelc.passes.quantize.granularity import Option, spend
from accelc.passes.quantize_weights import QuantizeWeights
from accelc.pipeline import step_pipeline


@pytest.fixture(scope="module")
def step() -> Program:
    return step_pipeline().run(capture(FAMILIES["llama"].build(), max_length=32))


@pytest.fixture(scope="module")
def text() -> Calibration:
    return Calibration(torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1)))


def size_in(step: Program, scheme: str) -> float:
    from accelc.passes.quantize.granularity import bits_of
    from accelc.passes.quantize.products import find_matrices

    found = [m for m in find_matrices(step).values() if m.products]
    return sum(bits_of(Scheme.parse(scheme), tuple(m.weight(step).shape)) for m in found) / 8


def test_bytes_go_where_they_matter(step: Program, text: Calibration) -> None:
    budget = 0.6 * size_in(step, "int4:g32") + 0.4 * size_in(step, "int8:g32")
    seen: list[tuple[str, int, int]] = []
    plan = plan_quantization(step, text, max_bytes=budget, progress=lambda *done: seen.append(done))
    assert plan.size <= budget
    per_byte = {c.path: c.sensitivity / (c.shape[0] * c.shape[1]) for c in plan.choices}
    bits = {c.path: 8 * c.size / (c.shape[0] * c.shape[1]) for c in plan.choices}
    most, least = (choose(per_byte, key=per_byte.__getitem__) for choose in (max, min))
    assert bits[most] > 8 > 5 > bits[least]
    everything = plan_quantization(step, text, max_bytes=budget, schemes=["int4:g64"])
    assert plan.measured < everything.measured
    assert seen[-1][1:] == (len(plan.choices), len(plan.choices))
    made = Pipeline([plan.to_pass()]).run(step)
    assert made.history[-1].matches == len(plan.choices)


def test_a_tolerated_loss_is_kept_and_used(step: Program, text: Calibration) -> None:
    coarse = plan_quantization(step, text, max_bytes=1e9, schemes=["int4:g64"])
    fine = plan_quantization(step, text, max_bytes=1e9, schemes=["int8:g32"])
    limit = (coarse.measured * fine.measured) ** 0.5
    plan = plan_quantization(step, text, max_loss=limit)
    assert plan.measured <= limit
    assert plan.size < fine.size


def test_plans_are_files(step: Program, text: Calibration, tmp_path: Path) -> None:
    plan = plan_quantization(step, text, max_bytes=1e9)
    plan.save(tmp_path / "plan.json")
    assert QuantizationPlan.load(tmp_path / "plan.json") == plan
    with pytest.raises(InputError, match="cannot be written"):
        plan.save(tmp_path / "none" / "plan.json")
    (tmp_path / "plan.json").write_text('{"weights": [{"path": "a"}]}')
    with pytest.raises(InputError, match="no quantization plan"):
        QuantizationPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "match"),
    [({}, "one budget"), ({"max_bytes": 1.0, "max_loss": 1.0}, "one budget"), ({"max_bytes": 10.0}, "at least"),
     ({"max_loss": 1e-12}, "finest"), ({"max_loss": float("nan")}, "max_loss is nan"), ({"max_bytes": 0}, "above 0"),
     ({"max_bytes": float("nan")}, "max_bytes is nan"), ({"max_bytes": "1MB"}, "max_bytes is '1MB'"),
     ({"max_loss": float("inf")}, "max_loss is inf"), ({"max_bytes": True}, "max_bytes is True"),
     ({"max_bytes": 1e6, "schemes": []}, r"schemes is \[\]"),
     ({"max_bytes": 1e6, "schemes": "int4"}, "schemes is 'int4'"),
     ({"max_bytes": 1e6, "schemes": [4]}, "unknown quantization scheme 4"),
     ({"max_bytes": 1e6, "program": None}, "the program is a NoneType"),
     ({"max_bytes": 1e6, "schemes": ["int5"]}, "unknown quantization scheme 'int5'"),
     ({"max_bytes": 1e6, "calibration": torch.zeros(2, 8).long()}, r"calibration is a Tensor[\s\S]*of_text")],
)  # fmt: skip
def test_budgets_that_cannot_be_kept_are_named(step: Program, text: Calibration, options: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        plan_quantization(**{"program": step, "calibration": text, **options})


def test_a_budget_counts_what_codes_take(step: Program, text: Calibration) -> None:
    """Rows of padding too: the head has 97."""
    plan = plan_quantization(step, text, max_bytes=50_000)
    made = Pipeline([plan.to_pass()]).run(step)
    taken = sum(t.nbytes for name, t in made.tensors().items() if ".quantized." in name)
    assert plan.size == taken <= 50_000


def test_plans_of_any_names_are_passes() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(97, 32)
            names = ("a,b", "a=b", "[z]", "*")
            self.parts = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in names})
            self.head = torch.nn.Linear(32, 97)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for part in self.parts.values():
                x = part(x).relu()
            return self.head(x)  # type: ignore[no-any-return]

    program = capture(Odd().eval(), max_length=16)
    plan = plan_quantization(program, Calibration(torch.randint(3, 90, (2, 8))), max_bytes=1e6, schemes=["int8"])
    assert len(plan.choices) == 5
    assert Pipeline([plan.to_pass()]).run(program).history[-1].matches == 5


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": None},
        {"size": "x"},
        {"path": None},
        {"more": 1},
        {"shape": 3},
        {"size": -5},
        {"loss": "x"},
        {"loss": float("nan")},
        {"shape": "ab"},
    ],
)
def test_plans_that_were_edited_are_named(change: dict, step: Program, text: Calibration, tmp_path: Path) -> None:
    plan_quantization(step, text, max_bytes=1e9).save(tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    record["weights"][1] |= change
    assert record["weights"][0]["path"] != record["weights"][1]["path"]
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"no quantization plan|unknown quantization scheme None"):
        QuantizationPlan.load(tmp_path / "plan.json")


def test_a_quantized_program_has_nothing_to_plan(step: Program, text: Calibration) -> None:
    made = Pipeline([QuantizeWeights("int8")]).run(step)
    with pytest.raises(InputError, match=r"no weight is left to plan for[\s\S]*quantized already"):
        plan_quantization(made, text, max_bytes=1e6)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"ids": "some text"}, "a text, not token ids"),
        ({"ids": [0.5, 1.0, 2.0]}, r"float32 \[3\]"),
        ({"ids": [True, False, True]}, r"bool \[3\]"),
        ({"ids": object()}, "of type object, which makes"),
        ({"ids": torch.ones(4).to_sparse()}, "sparse"),
        ({"ids": torch.ones(4, device="meta")}, "on meta"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, r"int64 \[2, 3\]"),
        ({"ids": [1]}, "of 1 tokens"),
        ({"ids": []}, "of 0 tokens"),
        ({"ids": range(9), "length": 0}, "length is 0"),
        ({"ids": range(9), "length": -5}, "length is -5"),
        ({"ids": range(9), "rows": 0}, "rows is 0"),
        ({"ids": range(9), "rows": 1.5}, "rows is 1.5"),
    ],
)
def test_texts_that_calibrate_nothing_are_named(given: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Calibration.of_text(**given)


@pytest.mark.parametrize("ids", [list(range(9)), range(9), torch.arange(9)[None], torch.arange(9, dtype=torch.int32)])
def test_texts_are_cut_into_pieces(ids: object) -> None:
    made = Calibration.of_text(ids, rows=2, length=4)  # type: ignore[arg-type]
    assert made.tokens.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_spending_is_as_good_as_trying_everything() -> None:
    """Against all combinations, up to the one step of the hull that a knapsack by slopes may waste."""
    import itertools
    import random

    random.seed(0)
    scheme = Scheme()
    for _ in range(50):
        options = {name: [Option(scheme, random.randint(1, 20), random.random()) for _ in range(4)] for name in "abcd"}
        budget = random.randint(8, 60)
        least = sum(min(o.bits for o in each) for each in options.values())
        chosen = spend(options, budget)
        if least > budget:
            continue
        assert sum(o.bits for o in chosen.values()) <= budget
        best = min(
            sum(o.loss for o in combination)
            for combination in itertools.product(*options.values())
            if sum(o.bits for o in combination) <= budget
        )
        widest = max(max(o.loss for o in each) - min(o.loss for o in each) for each in options.values())
        assert sum(o.loss for o in chosen.values()) <= best + widest
