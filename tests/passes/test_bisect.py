"""Bisecting a pipeline, and reproductions that run in a fresh interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
import torch
from toy_programs import affine, counter, node_of

from accelc.ir import Program, check
from accelc.ir.errors import PassError
from accelc.passes import Pipeline
from accelc.passes.bisect import bisect
from accelc.passes.reproduce import load_reproduction, save_reproduction

aten = torch.ops.aten

# Passes of a module of its own: a reproduction imports them from there.
MODULE = """
from dataclasses import dataclass
import torch
from accelc.passes import Pass, PassResult

@dataclass(frozen=True)
class Shift(Pass):
    name = "bisected.shift"
    by: float = 0.0
    matches: int = 1

    def run(self, program):
        program = program.clone()
        (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        node.args = (node.args[0], node.args[1] + self.by)
        return PassResult(program, self.matches)
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "bisected_passes.py").write_text(dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bisected_passes", raising=False)
    import bisected_passes

    return bisected_passes


def constant_is(*allowed: float) -> Callable[[Program], bool]:
    return lambda program: node_of(program, aten.add.Tensor).args[1] in allowed


def test_the_first_pass_that_breaks_the_check(toys: ModuleType) -> None:
    # 1 -> 1 -> 3 -> 1: the fault of the second pass is mended by the third, and still found.
    pipeline = Pipeline([toys.Shift(0), toys.Shift(2), toys.Shift(-2), toys.Shift(5)])
    culprit = bisect(pipeline, affine(), constant_is(1))
    assert culprit.number == 2
    assert culprit.one == toys.Shift(2)
    assert node_of(culprit.before, aten.add.Tensor).args[1] == 1
    assert node_of(culprit.after, aten.add.Tensor).args[1] == 3
    assert str(culprit) == "pass 2, bisected.shift(by=2, matches=1): the check returned False"
    assert bisect(pipeline, affine(), constant_is(1, 3)).number == 4


def test_none_when_nothing_breaks(toys: ModuleType) -> None:
    assert bisect(Pipeline([toys.Shift(1)]), affine(), lambda program: None) is None


def test_assertions_are_reasons(toys: ModuleType) -> None:
    def check_constant(program: Program) -> None:
        assert node_of(program, aten.add.Tensor).args[1] < 4, "too large"

    culprit = bisect(Pipeline([toys.Shift(1), toys.Shift(3)]), affine(), check_constant)
    assert culprit.number == 2
    assert "AssertionError: too large" in culprit.reason


def test_a_pass_that_fails_itself_is_the_culprit(toys: ModuleType) -> None:
    culprit = bisect(Pipeline([toys.Shift(1), toys.Shift(matches=0)]), affine(), lambda program: True)
    assert culprit.number == 2
    assert culprit.after is None
    assert "PassMatchError" in culprit.reason


def test_other_errors_of_the_check_are_not_swallowed(toys: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError):
        bisect(Pipeline([toys.Shift(1)]), affine(), lambda program: 1 / (1 - bool(program.history)) > 0)


def test_the_input_must_pass_the_check(toys: ModuleType) -> None:
    with pytest.raises(PassError, match="before any pass"):
        bisect(Pipeline([toys.Shift(1)]), affine(), constant_is(2))


def test_disabled_passes_are_skipped(toys: ModuleType) -> None:
    pipeline = Pipeline([toys.Shift(1), toys.Shift(1)], disabled=["bisected.shift"])
    assert bisect(pipeline, affine(), constant_is(1)) is None


def test_the_reproduction_runs_elsewhere(toys: ModuleType, tmp_path: Path) -> None:
    folder, inputs = tmp_path / "found", (torch.randn(2, 4),)
    culprit = bisect(Pipeline([toys.Shift(0), toys.Shift(0.5)]), affine(), constant_is(1), inputs=inputs, folder=folder)
    assert culprit.folder == folder
    assert "add.Tensor(mm_default, 1" in (folder / "before.txt").read_text()
    assert "add.Tensor(mm_default, 1.5" in (folder / "after.txt").read_text()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = [sys.executable, "reproduce.py"]
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "y: max abs error 5.00e-01" in done.stdout
    assert "bisected.shift(by=0.5" in (folder / "reproduce.py").read_text()


def test_a_reproduction_holds_the_same_program(toys: ModuleType, tmp_path: Path) -> None:
    program = counter()
    program.facts = {"cut": ["k", "v"], "unpicklable": program.placeholders()[0]}
    inputs = (torch.randn(2, 3, 2), torch.tensor([1, 4]), torch.zeros(2, 8, 2))
    save_reproduction(tmp_path, program, toys.Shift(2), inputs, "why", None)
    loaded, one, given = load_reproduction(tmp_path)
    check(loaded)
    assert one == toys.Shift(2)
    assert loaded.states == program.states
    assert loaded.facts == {"cut": ["k", "v"]}
    assert "unpicklable" in (tmp_path / "reproduce.py").read_text()
    assert loaded.listing() == program.listing()
    assert all(torch.equal(a, b) for a, b in zip(given, inputs))
    assert torch.equal(loaded.run(*given)[0], program.run(*(t.clone() for t in inputs))[0])


def test_a_pass_that_cannot_be_imported_is_named(toys: ModuleType, tmp_path: Path) -> None:
    save_reproduction(tmp_path, affine(), toys.Shift(), None, "why", None)
    del toys.Shift
    with pytest.raises(PassError, match=r"pass Shift cannot be imported[\s\S]*bisected_passes"):
        load_reproduction(tmp_path)


def test_symbolic_shapes_survive(toys: ModuleType, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.flatten() + torch.arange(tokens.shape[0] * tokens.shape[1])

    batch, length = torch.export.Dim("batch", min=3, max=64), torch.export.Dim("length", min=2, max=50)
    exported = torch.export.export(
        Model(), (torch.zeros(4, 7, dtype=torch.int64),), dynamic_shapes=({0: batch, 1: length},)
    )
    program = Program("sizes", exported.module(check_guards=False), ("tokens",), ("out",))
    output = program.graph.output_node()
    output.args = (tuple(output.args[0]),)
    save_reproduction(tmp_path, program, toys.Shift(), None, "why", None)
    loaded, _, given = load_reproduction(tmp_path)
    assert given is None
    shape = loaded.placeholders()[0].meta["val"].shape
    assert len({s.node.expr for s in shape}) == 2
    (merged,) = loaded.output_node("out").meta["val"].shape
    assert merged.node.expr == shape[0].node.expr * shape[1].node.expr
    ranges = shape[0].node.shape_env.var_to_range
    assert [(int(r.lower), int(r.upper)) for r in (ranges[s.node.expr] for s in shape)] == [(3, 64), (2, 50)]
    tokens = torch.randint(0, 9, (3, 5))
    assert torch.equal(loaded.run(tokens)[0], tokens.flatten() + torch.arange(15))
