"""Pipelines: what is checked after each pass, and what is kept about it."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import rich
import torch
from toy_programs import affine, counter, node_of

from accelc.ir import Exactness, Program
from accelc.ir.errors import (
    ExactnessError,
    InvariantError,
    PassMatchError,
    PassMutationError,
    PassOrderError,
    UnknownPassError,
    VerifyError,
)
from accelc.passes import Pass, PassResult, Pipeline, report

aten = torch.ops.aten


@dataclass(frozen=True)
class Act(Pass):
    """Does `action` to a clone."""

    name = "act"
    action: Callable[[Program], None] = field(default=lambda program: None, repr=False)
    matches: int = 1

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        self.action(program)
        return PassResult(program, self.matches, ("did it",))


@dataclass(frozen=True)
class Shift(Pass):
    """Adds `by` to the constant of `affine`."""

    name = "shift"
    by: float = 0.0

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        node = node_of(program, aten.add.Tensor)
        node.args = (node.args[0], node.args[1] + self.by)
        return PassResult(program, 1)


class Lossy(Shift):
    name = "lossy"
    exactness = Exactness.LOSSY


class Distribution(Shift):
    name = "distribution"
    exactness = Exactness.DISTRIBUTION


def test_runs_in_order_and_keeps_a_history() -> None:
    class Last(Act):
        name = "last"
        after = ("act",)

    program = affine()
    result = Pipeline([Last(), Act(matches=3), Distribution(1.0)]).run(program)
    assert [(r.name, r.matches) for r in result.history] == [("act", 3), ("last", 1), ("distribution", 1)]
    assert result.history[2].options == {"by": 1.0}
    assert result.history[0].notes == ("did it",)
    assert all(0 < r.seconds < 10 for r in result.history)
    assert result.exactness is Exactness.DISTRIBUTION
    assert program.history == ()
    x = torch.randn(2, 4)
    torch.testing.assert_close(result.run(x)[0], program.run(x)[0] + 1)


def test_guarantees_are_refused_before_anything_runs() -> None:
    ran = []
    passes = [Act(ran.append), Lossy(), Distribution()]
    with pytest.raises(ExactnessError, match=r"not be exact[\s\S]*lossy is lossy; distribution is distribution"):
        Pipeline(passes).run(affine(), require=Exactness.EXACT)
    assert not ran
    with pytest.raises(ExactnessError, match="where:  lossy is lossy\n"):
        Pipeline(passes).run(affine(), require=Exactness.DISTRIBUTION)
    result = Pipeline([Lossy()]).run(affine())
    with pytest.raises(ExactnessError, match="'affine' is lossy already"):
        Pipeline([Act()]).run(result, require=Exactness.EXACT)


@pytest.mark.parametrize(("matches", "expected", "fine"), [
    (0, (1, None), False),
    (0, (0, None), True),
    (3, (1, 2), False),
    (2, (1, 2), True),
])  # fmt: skip
def test_match_counts(matches: int, expected: tuple[int, int | None], fine: bool) -> None:
    class Counts(Act):
        name = "counts"
        expected_matches = expected

    pipeline = Pipeline([Counts(matches=matches)])
    if fine:
        assert pipeline.run(affine()).history[0].matches == matches
    else:
        with pytest.raises(PassMatchError, match=f"'counts' matched {matches} times"):
            pipeline.run(affine())


def test_broken_invariants_name_the_pass_and_the_node() -> None:
    def spoil(program: Program) -> None:
        node_of(program, aten.add.Tensor).target = torch.add

    with pytest.raises(InvariantError, match=r"pass 'act': .*torch|pass 'act': .*add[\s\S]*->"):
        Pipeline([Act(spoil)]).run(affine())


def _change_node(program: Program) -> None:
    node_of(program, aten.add.Tensor).args = (program.placeholders()[0], 1)


def _change_tensor(program: Program) -> None:
    program.tensors()["layer.weight"].mul_(2)


def _change_fact(program: Program) -> None:
    program.facts["found"] = 1


@pytest.mark.parametrize("mutate", [_change_node, _change_tensor, _change_fact])
def test_the_input_of_a_pass_stays_as_it_is(mutate: Callable[[Program], None]) -> None:
    class InPlace(Pass):
        name = "in_place"

        def run(self, program: Program) -> PassResult:
            mutate(program)
            return PassResult(program, 1)

    with pytest.raises(PassMutationError, match="'in_place'"):
        Pipeline([InPlace()]).run(affine())


def test_a_pass_must_return_a_result() -> None:
    class Forgets(Pass):
        name = "forgets"

        def run(self, program: Program) -> PassResult:
            return program.clone()  # type: ignore[return-value]

    with pytest.raises(TypeError, match="'forgets' must return a PassResult, not Program"):
        Pipeline([Forgets()]).run(affine())


def test_errors_inside_a_pass_name_it() -> None:
    def fail(program: Program) -> None:
        raise KeyError("missing")

    with pytest.raises(KeyError) as caught:
        Pipeline([Act(fail)]).run(affine())
    assert caught.value.__notes__ == ["in pass act(action=" + repr(fail) + ", matches=1)"]


def test_ensured_facts_stand_afterwards() -> None:
    class Gives(Act):
        name = "gives"
        ensures = ("seen", "measured")

    class Needs(Act):
        name = "needs"
        requires = ("seen",)

    def store(program: Program) -> None:
        program.facts["measured"] = 42

    result = Pipeline([Needs(), Gives(store)]).run(affine())
    assert result.facts == {"seen": True, "measured": 42}
    assert [r.name for r in result.history] == ["gives", "needs"]
    Pipeline([Needs()]).run(result)
    with pytest.raises(PassOrderError, match="'needs' requires seen"):
        Pipeline([Needs()]).run(affine())


# -- switching passes off --------------------------------------------------------------------------------------------


def test_disabled_by_option_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4)
    program = affine()
    result = Pipeline([Shift(5.0), Act()], disabled=["shift"]).run(program)
    assert torch.equal(result.run(x)[0], program.run(x)[0])
    assert [(r.name, r.matches, r.notes) for r in result.history] == [
        ("shift", 0, ("disabled",)),
        ("act", 1, ("did it",)),
    ]
    monkeypatch.setenv("ACCELC_DISABLE_PASSES", "shift, normalise")
    assert torch.equal(Pipeline([Shift(5.0)]).run(program).run(x)[0], program.run(x)[0])
    assert str(Pipeline([Shift(5.0), Act()])).startswith("[shift(by=5.0)] -> act(")


def test_a_disabled_lossy_pass_does_not_weaken_the_guarantee() -> None:
    result = Pipeline([Lossy()], disabled=["lossy"]).run(affine(), require=Exactness.EXACT)
    assert result.exactness is Exactness.EXACT


def test_misspelled_names_are_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownPassError, match=r"disable shfit[\s\S]*shift"):
        Pipeline([Shift()], disabled=["shfit"])
    monkeypatch.setenv("ACCELC_DISABLE_PASSES", "shfit")
    with pytest.raises(UnknownPassError, match="ACCELC_DISABLE_PASSES"):
        Pipeline([Shift()])


# -- numeric comparison ----------------------------------------------------------------------------------------------


def test_an_exact_pass_that_changes_numbers_is_caught() -> None:
    inputs = (torch.randn(2, 4),)
    with pytest.raises(VerifyError, match=r"'shift' is declared exact[\s\S]*y: max abs error 5.00e-01") as caught:
        Pipeline([Act(), Shift(0.5)]).run(affine(), verify=inputs)
    assert "act" not in caught.value.where
    assert Pipeline([Shift(1e-7)]).run(affine(), verify=inputs).history[0].notes[0].startswith("y: max abs error")
    with pytest.raises(VerifyError):
        Pipeline([Shift(1e-3)]).run(affine(), verify=inputs, tolerance=1e-6)
    Pipeline([Shift(1e-3)]).run(affine(), verify=inputs, tolerance=1e-2)


def test_a_lossy_pass_gets_its_error_noted() -> None:
    result = Pipeline([Lossy(0.5)]).run(affine(), verify=(torch.randn(2, 4),))
    assert result.history[0].notes[0].startswith("y: max abs error 5.00e-01, relative")


def test_states_are_compared_and_inputs_left_alone() -> None:
    def write_elsewhere(program: Program) -> None:
        """The sum is over all slots, so only the cache tells."""
        update = node_of(program, torch.ops.accelc.cache_update.default)
        cache, rows, lengths, dim = update.args
        with program.graph.inserting_before(update):
            later = program.graph.call_function(aten.add.Tensor, (lengths, 1))
        update.args = (cache, rows, later, dim)

    cache = torch.zeros(2, 8, 2)
    inputs = (torch.randn(2, 3, 2), torch.tensor([1, 4]), cache)
    with pytest.raises(VerifyError, match="where:  state cache: max abs error"):
        Pipeline([Act(write_elsewhere)]).run(counter(), verify=inputs)
    assert not cache.any()


def test_inputs_may_come_from_a_function() -> None:
    result = Pipeline([Act(), Shift()]).run(
        affine(), verify=lambda program: (torch.ones(1, 4),) if not program.history else None
    )
    assert result.history[0].notes[1].startswith("y: ")
    assert result.history[1].notes == ()


def test_what_cannot_be_compared_says_so() -> None:
    def rename(program: Program) -> None:
        program.outputs = ("z",)

    result = Pipeline([Act(rename)]).run(affine(), verify=(torch.randn(2, 4),))
    assert "not compared: no output name in common" in result.history[0].notes[1]
    result = Pipeline([Act()]).run(affine(), verify=())
    assert result.history[0].notes[1] == "not compared: 0 inputs given for 1 placeholders"


# -- reports ---------------------------------------------------------------------------------------------------------


def test_dump_writes_a_listing_before_and_after_each_pass(tmp_path: Path) -> None:
    Pipeline([Act(), Shift(2)]).run(affine(), dump=tmp_path / "new" / "folder")
    files = {p.name: p.read_text() for p in (tmp_path / "new" / "folder").iterdir()}
    assert sorted(files) == ["00-input.txt", "01-act.txt", "02-shift.txt"]
    assert "add.Tensor(mm_default, 1)" in files["01-act.txt"]
    assert "add.Tensor(mm_default, 3)" in files["02-shift.txt"]


def test_the_report_is_a_table() -> None:
    out = io.StringIO()
    program = Pipeline([Shift(0.25), Lossy()]).run(affine())
    rich.print(report(program), file=out)
    text = out.getvalue()
    assert "affine: lossy" in text
    (row,) = [line for line in text.splitlines() if "shift" in line]
    assert [cell.strip() for cell in row.split("│")][1:6:2] == ["shift", row.split("│")[3].strip(), "by=0.25"]
