"""Training learns, is reproducible, is cached, and an interruption leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from accelc.codegen.cache import cache_dir
from accelc.demo import training
from accelc.demo.corpus import read_corpus
from accelc.demo.settings import Settings
from accelc.demo.tokenizer import encode_files

TINY = Settings(
    vocabulary=400, hidden=64, layers=1, heads=4, kv_heads=2, context=64, window=32, steps=30, corpus_bytes=200_000
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_learns_saves_and_loads_the_same(cache: Path) -> None:
    first = training.trained_model(TINY, Console(quiet=True))
    assert not first.cached
    assert first.path.parent == cache == cache_dir()
    uniform = torch.tensor(float(TINY.vocabulary)).log().item()
    assert first.record["held_out_loss"] < uniform - 0.5
    assert {p.name for p in first.path.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}

    second = training.trained_model(TINY, Console(quiet=True))
    assert second.cached
    assert second.record == first.record
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=0)
    # A plain transformers directory: nothing of ours is needed to read it.
    assert AutoModelForCausalLM.from_pretrained(first.path).config.num_key_value_heads == 2
    assert AutoTokenizer.from_pretrained(first.path).decode(second.tokenizer("a = b")["input_ids"]) == "a = b"


def test_held_out_loss_is_the_mean_negative_log_likelihood(cache: Path) -> None:
    trained = training.trained_model(TINY, Console(quiet=True))
    tokens = encode_files(trained.tokenizer, read_corpus(TINY.corpus_bytes).held_out.values())
    rows = tokens[: len(tokens) // TINY.window * TINY.window].view(-1, TINY.window)[: training.HELD_OUT_WINDOWS]
    with torch.no_grad():
        likelihood = trained.model(rows).logits[:, :-1].double().log_softmax(-1)
    expected = -likelihood.gather(2, rows[:, 1:, None]).mean().item()
    assert trained.record["held_out_loss"] == pytest.approx(expected, rel=1e-3)


def test_the_same_seed_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for run in ("first", "second"):
        monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path / run))
        torch.rand(3)  # the surrounding random state does not matter
        losses.append(training.trained_model(TINY, Console(quiet=True)).record["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_interruption_leaves_no_trace(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_held_out_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.trained_model(TINY, Console(quiet=True))
    assert list(cache.iterdir()) == []
    assert not training.trained_model(TINY, Console(quiet=True)).cached


def test_settings_name_the_cached_model(cache: Path) -> None:
    short = training.trained_model(Settings(**{**TINY.as_dict(), "steps": 2}), Console(quiet=True))
    shorter = training.trained_model(Settings(**{**TINY.as_dict(), "steps": 1}), Console(quiet=True))
    assert short.path != shorter.path
    assert json.loads((shorter.path / "training.json").read_text())["settings"]["steps"] == 1
