"""The command line on a small saved model: generate, doctor's own checks, passes, and errors without tracebacks."""

import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from greedy import reference
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import accelc
from accelc.cli import app
from accelc.doctor import CHECKS

WORDS = [f"w{i:02d}" for i in range(97)]
runner = CliRunner()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama"].build().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w00"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w00").save_pretrained(folder)
    return folder


def test_generate_streams_the_greedy_continuation(saved: Path) -> None:
    prompt = torch.tensor([5, 9, 33])
    expected = reference(FAMILIES["llama"].build(), prompt, 6)
    result = runner.invoke(app, ["generate", str(saved), "--prompt", "w05 w09 w33", "--max-new-tokens", "6"])
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [WORDS[token] for token in expected]


def test_generate_reads_standard_input_and_reports(saved: Path) -> None:
    result = runner.invoke(
        app, ["generate", str(saved), "--max-new-tokens", "2", "--report", "--eager"], input="w05 w09"
    )
    assert result.exit_code == 0, result.output
    assert "derive_step" in result.output
    assert "tok/s" in result.output


def test_generate_with_drafters(saved: Path) -> None:
    command = ["generate", str(saved), "--prompt", "w05 w09 w33", "--max-new-tokens", "9"]
    plain = runner.invoke(app, command)
    for options in (["--draft", "prompt_lookup"], ["--draft-model", str(saved), "--accept", "rejection"]):
        result = runner.invoke(app, [*command, *options, "--report"])
        assert result.exit_code == 0, result.output
        assert result.stdout == plain.stdout
        assert "tokens a step" in result.output
        assert "accepted below" in result.output


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--temperature", "-1"], "SamplingError"),
        (["--dtype", "int3"], "InputError"),
        (["--max-length", "2"], "PromptTooLong"),
        (["--max-length", "3", "--max-new-tokens", "1"], "PromptTooLong"),
        (["--prompt", ""], "EmptyPromptError"),
        (["--stop", ""], "StopError"),
        (["--seed", "-1"], "SamplingError"),
        (["--draft", "prompt_look"], "DraftError"),
        (["--accept", "matching"], "DraftError"),
        (["--draft", "prompt_lookup", "--accept", "hopeful"], "DraftError"),
        (["--draft", "prompt_lookup", "--draft-model", "x"], "InputError"),
        (["--draft-model", "no-such-directory"], "InputError"),
        (["--heads", "no-such-file"], "InputError"),
        (["--draft", "prompt_lookup", "--tree", "dynamic"], "InputError"),
        (["--draft", "token_recycling", "--tree", "no-such-file"], "TreeError"),
        (["--statistics", "s.json"], "InputError"),
        (["--draft", "prompt_lookup", "--statistics", "no-such-folder/s.json"], "InputError"),
    ],
)
def test_errors_are_named_without_a_traceback(saved: Path, arguments: list[str], name: str) -> None:
    result = runner.invoke(app, ["generate", str(saved), "--prompt", "w05 w06 w07", *arguments])
    assert result.exit_code == 1
    assert name in result.output
    assert "Traceback" not in result.output


def test_an_empty_input_and_settings_without_effect_are_told(saved: Path) -> None:
    result = runner.invoke(app, ["generate", str(saved), "--eager"], input="")
    assert result.exit_code == 1
    assert "pipe text in" in result.output
    result = runner.invoke(
        app, ["generate", str(saved), "--prompt", "w05", "--eager", "--seed", "3", "--max-new-tokens", "1", "--report"]
    )
    assert "have no effect" in result.output
    assert "nan" not in result.output
    assert "…" not in result.output, "the report is cut"


def test_help_shows_examples_and_the_version_is_known() -> None:
    assert "--stop" in runner.invoke(app, ["generate", "--help"]).output
    assert 'accelc generate path/to/model --prompt "def main():"' in runner.invoke(app, ["generate", "--help"]).output
    assert "accelc.compile(model)" in runner.invoke(app, ["--help"]).output
    assert runner.invoke(app, ["--version"]).output == f"accelc {accelc.__version__}\n"


def test_a_missing_package_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails, as where it is not installed
    result = runner.invoke(app, ["generate", str(saved), "--prompt", "x"])
    assert result.exit_code == 1
    assert "transformers is not installed" in result.output


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    result = runner.invoke(app, ["generate", str(tmp_path), "--prompt", "x"])
    assert result.exit_code == 1
    assert "config.json" in result.output


def test_passes_are_listed() -> None:
    result = runner.invoke(app, ["passes"])
    assert result.exit_code == 0
    assert "derive_step" in result.output
    described = " ".join(result.output.replace("│", " ").split())
    assert "new input after lengths." in described, "the sentence is cut"


@pytest.mark.parametrize("name", [name for name, _, needed in CHECKS if needed])
def test_doctor_finds_this_machine_well(name: str) -> None:
    check = next(check for known, check, _ in CHECKS if known == name)
    assert check()
