"""The benchmark's tables: what a terminal of 80 columns shows, and the Markdown of a run."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

from peers import NAMES, load
from samples import Case, Row, Sample
from tables import COLUMNS, markdown, terminal

ENVIRONMENT = {
    "cpu": "a processor",
    "capability": "AVX512",
    "versions": {"torch": "2.13.0"},
    "commit": "abc1234",
    "dirty": False,
    "command": "python decode.py",
}


@pytest.fixture
def case() -> Case:
    """Every peer, with numbers as wide as they get."""
    made = Case("160m", "fp32", 64, 64, 2, bytes_per_token=1e9, skipped={"weak": "a long reason " * 9})
    for name in NAMES:
        samples = [Sample("a/0", 4 if name == "torchao" else 1234.56, 12.344, 2500, 2500)]
        peer = load(name).PEER
        made.rows[name] = Row(peer.title, peer.lossy, 1234.56, 123.45, samples, [1, 2, 3])
    return made


def shown(case: Case, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal(case))
    return console.file.getvalue().splitlines()


def test_terminal_loses_nothing_at_80_columns(case: Case) -> None:
    lines = shown(case, 80)
    text = "\n".join(lines)
    assert max(len(line) for line in lines) <= 80
    assert "…" not in text
    words = [word for heading, _, _ in COLUMNS for word in heading.split()]
    words += [word for row in case.rows.values() for word in row.title.split()]
    assert [word for word in words if word not in text.split()] == []
    assert text.split().count("1234.6") == 2 * len(NAMES) - 1  # rates and cold starts
    assert "308.64x" in text
    assert " ".join(line.strip() for line in lines).count("a long reason") == 9


def test_steps_alone_are_told_under_the_table(case: Case) -> None:
    note = "a step of accelc alone: 0.93 of the limit"
    assert note not in "\n".join(shown(case, 80)) + markdown([case], ENVIRONMENT)
    case.rows["accelc"].step_of_limit = 0.934
    assert note in "\n".join(shown(case, 80))
    assert f"- 160m fp32, {note}" in markdown([case], ENVIRONMENT)


def test_terminal_keeps_a_decoder_on_one_line_where_there_is_room(case: Case) -> None:
    lines = shown(case, 140)
    for row in case.rows.values():
        assert any(line.startswith(f"{row.title} ") for line in lines)


def test_markdown_is_one_table_with_each_model_named_once(case: Case) -> None:
    other = Case("1b", "bf16", 64, 64, 2, bytes_per_token=1e9, rows={"accelc": case.rows["accelc"]})
    lines = markdown([case, other], ENVIRONMENT).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(NAMES) + 1
    assert {line.count("|") for line in table} == {len(COLUMNS) + 3}
    assert [line.split("|")[1].strip() for line in table[2:] if line.split("|")[1].strip()] == [case.title, other.title]
    cells = [cell.strip() for cell in table[2].split("|")]
    assert cells[2:7] == ["accelc", "1234.6", "0.49", "-", "12.34"]
    assert "- 160m fp32, weak: " + ("a long reason " * 9).rstrip() in [line.rstrip() for line in lines]


@pytest.mark.parametrize("dirty", [False, True])
def test_markdown_tells_what_it_ran_on(case: Case, dirty: bool) -> None:
    first = markdown([case], ENVIRONMENT | {"dirty": dirty}).splitlines()[0]
    for part in ("a processor", "AVX512", "torch 2.13.0", "commit abc1234", "`python decode.py`"):
        assert part in first
    assert ("uncommitted" in first) == dirty
