"""Trees from recorded statistics: counts add up, the tree is the best one, its size follows the step times."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from typer.testing import CliRunner

import accelc
from accelc.cli import app
from accelc.ir.errors import InputError, TreeError
from accelc.runtime.speculation.statistics import SpeculationStatistics
from accelc.runtime.speculation.trees import Tree, best_tree
from accelc.runtime.speculation.tuning import expected_tokens, tune_tree
from accelc.speculation_report import plot_statistics


def recorded(**changes: object) -> SpeculationStatistics:
    given = {
        "drafter": "hydra", "rule": "matching", "row_steps": 100, "tokens": 200, "lengths": (0, 50, 25, 25),
        "reached": ((100, 100, 0), (80, 20, 0)), "accepted": ((60, 20, 0), (40, 2, 0)),
        "seconds": {"draft": 0.1, "verify": 0.5, "accept": 0.2, "update": 0.1},
        "step_seconds": {1: (30, 1.0), 3: (30, 1.0), 6: (40, 3.0)},
    }  # fmt: skip
    return SpeculationStatistics(**{**given, **changes})  # type: ignore[arg-type]


def test_files_come_back(tmp_path: Path) -> None:
    recorded().save(tmp_path / "s.json")
    assert SpeculationStatistics.load(tmp_path / "s.json") == recorded()
    tree = Tree.of_paths([(0,), (1,), (0, 2)])
    tree.save(tmp_path / "t.json")
    assert Tree.load(tmp_path / "t.json") == tree
    for content in ("", "[]", '{"format": "other"}', '{"format": "accelc.speculation.1"}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match="no statistics"):
            SpeculationStatistics.load(tmp_path / "bad.json")
    for content in ("", "3", "[[0, 0]]", '["a"]', "[[0], [0]]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(TreeError):
            Tree.load(tmp_path / "bad.json")


def test_the_tree_is_the_best_for_the_merged_counts() -> None:
    other = recorded(reached=((100, 0, 0),), accepted=((20, 0, 0),))
    tuned = tune_tree([recorded(), other], 4)
    assert tuned.accuracy == ((0.4, 0.2, 0.0), (0.5, 0.1, 0.0))
    assert tuned.tree == best_tree([[0.4, 0.2, 0.0], [0.5, 0.1, 0.0]], 3)
    assert tuned.tree.paths() == [(0,), (1,), (0, 0)] or tuned.tree.paths() == [(0,), (0, 0), (1,)]
    assert tuned.expected == pytest.approx((1.0, 1.4, 1.6, 1.8))
    assert tune_tree([recorded()], 100).tree.width == 2, "what was never right is no draft"


def test_the_size_gives_most_tokens_a_second() -> None:
    assert tune_tree([recorded()]).tree.size == 3
    assert tune_tree([recorded(step_seconds={1: (30, 1.0), 3: (30, 1.0), 6: (40, 1.0)})]).tree.size == 6
    assert tune_tree([recorded(step_seconds={1: (30, 0.1), 6: (40, 1.0)})]).tree.size == 2, "a tree has a draft"
    few = tune_tree([recorded(step_seconds={1: (30, 1.0), 6: (3, 1.0)})])
    assert "fewer than two sizes" in few.chosen


def test_expectation_is_the_product_along_the_path() -> None:
    tree = Tree.of_paths([(0,), (0, 1), (1,), (0, 0, 0)][:3])
    assert expected_tokens(tree, [[0.5, 0.25], [0.5, 0.1]]) == pytest.approx([1, 1.5, 1.55, 1.8])


def test_statistics_that_say_nothing() -> None:
    with pytest.raises(InputError, match="nothing"):
        tune_tree([])
    with pytest.raises(InputError, match="hydra, medusa"):
        tune_tree([recorded(), recorded(drafter="medusa")])
    with pytest.raises(InputError, match="nodes"):
        tune_tree([recorded()], 1)
    with pytest.raises(InputError, match="no draft"):
        tune_tree([recorded(reached=((0, 0),), accepted=((0, 0),))])


def test_from_a_generation_to_a_tree(tmp_path: Path) -> None:
    decoder = accelc.compile(FAMILIES["llama"].build(), max_length=96, cache=False)
    found = decoder.generate(
        [[5, 9, 5, 9]], max_new_tokens=80, ignore_eos=True, draft="token_recycling", draft_nodes=12
    )
    statistics = found.statistics.speculation
    assert statistics is not None
    assert sum(count for count, _ in statistics.step_seconds.values()) == found.statistics.steps
    statistics.save(tmp_path / "s.json")
    assert plot_statistics(statistics, tmp_path / "s.svg") is not None
    assert "</svg>" in (tmp_path / "s.svg").read_text()
    ran = CliRunner().invoke(
        app, ["tune-tree", str(tmp_path / "s.json"), "--nodes", "5", "--out", str(tmp_path / "t.json")]
    )
    assert ran.exit_code == 0, ran.output
    assert "tokens expected" in ran.output
    tree = Tree.load(tmp_path / "t.json")
    assert 2 <= tree.size <= 5
    again = decoder.generate([[5, 9]], max_new_tokens=9, ignore_eos=True, draft=accelc.TokenRecycling(tree))
    plain = decoder.generate([[5, 9]], max_new_tokens=9, ignore_eos=True)
    assert again.tokens[0].tolist() == plain.tokens[0].tolist()
    assert CliRunner().invoke(app, ["tune-tree", str(tmp_path / "none.json")]).exit_code == 1
