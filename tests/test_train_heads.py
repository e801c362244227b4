"""Training of heads: they learn, go on where they were cut off, spread over processes, and bad input is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from models.plain import Counting
from safetensors.torch import load_file
from test_cli import WORDS, runner
from test_cli import saved as saved  # a fixture
from torch import Tensor, nn

import accelc
from accelc.cli import app
from accelc.heads.corpus import own_samples, read_documents, windows_of
from accelc.heads.files import load_heads
from accelc.heads.modules import HYDRA, KINDS, MEDUSA, DraftHeads, HeadsConfig
from accelc.heads.objective import Objective, accuracy
from accelc.heads.training import TrainSettings, train_heads
from accelc.ir.errors import DraftError, InputError

SMALL = TrainSettings(heads=2, steps=12, window=16, rows=4, save_every=5, warmup=2, precision="no")


def text(rows: int = 24, length: int = 16, seed: int = 0) -> Tensor:
    """Runs of counting numbers, which two tokens of a row give away."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 97, (rows, 1), generator=generator)
    step = torch.randint(1, 4, (rows, 1), generator=generator)
    return (start + step * torch.arange(length)) % 97


# -- what is trained for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [False, True], ids=["last", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_shifted_labels(kind: str, prefix: bool) -> None:
    torch.manual_seed(0)
    heads = DraftHeads(HeadsConfig(kind, 8, 6, 11, heads=3, prefix=prefix))
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, embeddings, logits = torch.randn(2, 7, 8), torch.randn(2, 7, 6), torch.randn(2, 7, 11)
    tokens = torch.randint(0, 11, (2, 7))
    read = heads.contextual(hidden)
    hits = torch.zeros(3, 10, dtype=torch.int64)
    for teacher in (False, True):
        losses = Objective(heads, teacher=teacher)(hidden, embeddings, tokens, logits)
        for index in range(3):
            expected = []
            for row in range(2):
                for t in range(7 - index - 2):
                    path = [embeddings[row, t + 1 + step] for step in range(index + 1)]
                    scores = heads.score(index, read[row, t], path).log_softmax(-1)
                    if teacher:
                        expected.append(-(logits[row, t + index + 1].softmax(-1) * scores).sum())
                    else:
                        expected.append(-scores[tokens[row, t + index + 2]])
                        ranking = scores.argsort(descending=True)[:10]
                        hits[index] += ranking == logits[row, t + index + 1].argmax()
            torch.testing.assert_close(losses[index], torch.stack(expected).mean())
    assert torch.equal(accuracy(heads, hidden, embeddings, logits), hits)


@pytest.mark.parametrize(("kind", "prefix"), [(MEDUSA, False), (HYDRA, True)])
def test_heads_learn_and_are_written(tmp_path: Path, kind: str, prefix: bool) -> None:
    model = Counting(96)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = replace(SMALL, kind=kind, prefix=prefix, steps=80, rate=1e-2, rows=8)
    losses = []
    windows = (text(64)[:, :1] + torch.arange(16)) % 96  # what the model says
    file = train_heads(
        model, windows, settings, tmp_path / "h.safetensors", progress=lambda _, __, loss: losses.append(loss)
    )
    assert len(losses) == 80
    assert losses[-1] < 0.7 * losses[0]
    assert (len(file.accuracy), len(file.accuracy[0])) == (2, 10)
    assert file.model == "Counting"
    assert not (tmp_path / "h.safetensors.training").exists()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model is frozen"
    found = load_heads(tmp_path / "h.safetensors")
    torch.testing.assert_close(torch.tensor(found.accuracy), torch.tensor(file.accuracy))
    decoder = accelc.compile(model, max_length=64, cache=False)
    draft = (accelc.Hydra if kind == HYDRA else accelc.Medusa)(tmp_path / "h.safetensors")
    prompts = [row[:6].tolist() for row in windows[:4]]
    plain = decoder.generate(prompts, max_new_tokens=24, ignore_eos=True)
    fast = decoder.generate(prompts, max_new_tokens=24, ignore_eos=True, draft=draft, draft_nodes=12)
    assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]
    assert fast.statistics.speculation.mean_accepted_length > 1.3


def test_own_samples_are_what_the_model_says() -> None:
    model = FAMILIES["llama"].build()
    decoder, windows, seen = accelc.compile(model, max_length=16, cache=False), text(5), []
    said = own_samples(decoder, windows, temperature=0.0, seed=0, rows=2, progress=lambda d, t: seen.append((d, t)))
    assert said.shape == windows.shape
    assert torch.equal(said[:, :8], windows[:, :8])
    expected = decoder.generate(windows[:, :8], max_new_tokens=8, ignore_eos=True).tokens
    assert [row[8:].tolist() for row in said] == [row.tolist() for row in expected]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    drawn = [own_samples(decoder, windows, temperature=1.0, seed=seed, rows=2) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# -- cut off, and in several processes -------------------------------------------------------------------------------


def trained(path: Path) -> dict[str, Tensor]:
    return load_file(path)


class CutOff(Exception):
    """Raised in the middle of a training."""


def test_a_training_goes_on_where_it_was(tmp_path: Path) -> None:
    model, settings = Counting(97), replace(SMALL, accumulate=2)
    train_heads(model, text(), settings, tmp_path / "whole.safetensors")

    def cut(step: int, _: int, __: float) -> None:
        if step == 8:
            raise CutOff

    with pytest.raises(CutOff):
        train_heads(model, text(), settings, tmp_path / "h.safetensors", progress=cut)
    assert not (tmp_path / "h.safetensors").exists()
    with pytest.raises(InputError, match="other settings, texts or model lies there: rate"):
        train_heads(model, text(), replace(settings, rate=1.0), tmp_path / "h.safetensors")
    with pytest.raises(InputError, match="data"):
        train_heads(model, text(seed=1), settings, tmp_path / "h.safetensors")
    other = Counting(97)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    with pytest.raises(InputError, match="lies there: model"):
        train_heads(other, text(), settings, tmp_path / "h.safetensors")
    steps = []
    train_heads(model, text(), settings, tmp_path / "h.safetensors", progress=lambda step, *_: steps.append(step))
    assert steps == list(range(6, 13))
    for name, tensor in trained(tmp_path / "whole.safetensors").items():
        assert torch.equal(trained(tmp_path / "h.safetensors")[name], tensor)
    with pytest.raises(CutOff):
        train_heads(model, text(), settings, tmp_path / "h.safetensors", restart=True, progress=cut)
    steps.clear()
    train_heads(
        model, text(), replace(settings, seed=1), tmp_path / "h.safetensors", restart=True,
        progress=lambda step, *_: steps.append(step),
    )  # fmt: skip
    assert steps[0] == 1


def test_what_has_ended_is_not_done_again_and_nothing_is_written_over(tmp_path: Path) -> None:
    model, out = Counting(97), tmp_path / "h.safetensors"

    def no_step(*_: object) -> None:
        raise AssertionError("a step of training")

    first = train_heads(model, text(), SMALL, out)
    written = out.read_bytes()
    again = train_heads(model, text(), SMALL, out, progress=no_step)
    assert again.accuracy == pytest.approx(torch.tensor(first.accuracy).numpy())
    for name, tensor in trained(out).items():
        assert torch.equal(again.heads.state_dict()[name], tensor)
    other = Counting(97)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    for what, given in {
        "rate": (model, text(), replace(SMALL, rate=1.0)),
        "data": (model, text(seed=1), SMALL),
        "model": (other, text(), SMALL),
    }.items():
        with pytest.raises(InputError, match=f"there already, with other .*{what}") as error:
            train_heads(*given, out, progress=no_step)
        assert "--restart" in str(error.value)
    with pytest.raises(InputError, match="held_out_data"):
        train_heads(model, text()[:-1], SMALL, out, held_out=text(2), progress=no_step)
    assert out.read_bytes() == written
    (tmp_path / "notes.txt").write_text("not heads")
    with pytest.raises(InputError, match="there already"):
        train_heads(model, text(), SMALL, tmp_path / "notes.txt", progress=no_step)
    assert (tmp_path / "notes.txt").read_text() == "not heads"


@pytest.mark.parametrize(("file", "size"), [("model.safetensors", 100), ("optimizer.bin", 0), ("../settings.json", 3)])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, size: int) -> None:
    out = tmp_path / "h.safetensors"

    def cut(step: int, _: int, __: float) -> None:
        if step == 8:
            raise CutOff

    with pytest.raises(CutOff):
        train_heads(Counting(97), text(), SMALL, out, progress=cut)
    (checkpoint,) = (tmp_path / "h.safetensors.training").glob("step-*")
    with open(checkpoint / file, "r+b") as damaged:
        damaged.truncate(size)
    with pytest.raises(InputError, match="cannot be read") as error:
        train_heads(Counting(97), text(), SMALL, out)
    assert "--restart" in str(error.value)
    train_heads(Counting(97), text(), SMALL, out, restart=True)
    assert out.exists()


def command(saved: Path, folder: Path, out: str, *more: str) -> list[str]:
    texts = folder / "texts.jsonl"
    if not texts.exists():
        lines = [json.dumps({"text": " ".join(WORDS[token] for token in row)}) for row in text(30, 48).tolist()]
        texts.write_text("\n".join(lines) + "\n")
    return ["train-heads", str(saved), str(texts), "--out", str(folder / out), "--window", "16", "--rows", "2",
            "--steps", "12", "--heads", "2", "--precision", "no", "--save-every", "1", *more]  # fmt: skip


@pytest.mark.slow
def test_a_killed_training_goes_on(saved: Path, tmp_path: Path) -> None:
    arguments = command(saved, tmp_path, "h.safetensors", "--steps", "400")
    run = [sys.executable, "-c", "from accelc.cli import main; main()", *arguments]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "h.safetensors.training"
    deadline = time.monotonic() + 120
    while not list(folder.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "h.safetensors").exists()
    assert list(folder.glob("step-*"))
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "right on held-out text" in result.output
    assert load_heads(tmp_path / "h.safetensors").config.heads == 2
    assert not folder.exists()


def test_two_processes_train_as_one_with_twice_the_rows(saved: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, command(saved, tmp_path, "one.safetensors", "--rows", "4"))
    assert result.exit_code == 0, result.output
    assert "training: 12 of 12, loss" in result.output  # a log has lines
    again = runner.invoke(app, command(saved, tmp_path, "one.safetensors", "--rows", "4"))
    assert (again.exit_code, "nothing was left to do" in again.output) == (0, True), again.output
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "main.py"
    script.write_text("from accelc.cli import main\nmain()\n")
    ran = subprocess.run(
        [*launch, str(script), *command(saved, tmp_path, "two.safetensors")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("Written:") == 1
    one, two = (trained(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_texts_that_are_none(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "lines.jsonl").write_text('{"text": "w01"}\n\n{"words": "w02"}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "plain.txt").write_text("w01 w02")
    (tmp_path / "latin.txt").write_bytes("w01 é".encode("latin-1"))
    (tmp_path / "separator.jsonl").write_text('{"text": "w01\u2028w02"}\n')
    assert read_documents([tmp_path / "separator.jsonl"]) == ["w01\u2028w02"]
    (tmp_path / "good.jsonl").write_text('{"body": "w01 w02"}\n{"body": ""}\n{"body": "w03"}\n')
    assert read_documents([tmp_path / "plain.txt", tmp_path / "empty.txt"]) == ["w01 w02"]
    assert read_documents([tmp_path / "good.jsonl"], "body") == ["w01 w02", "w03"]
    for name, match in (("lines.jsonl", "line 3"), ("number.jsonl", "line 1"), ("none.txt", "cannot read")):
        with pytest.raises(InputError, match=match):
            read_documents([tmp_path / name])
    with pytest.raises(InputError, match=r"latin\.txt: .*utf-8"):
        read_documents([tmp_path / "latin.txt"])
    tokenizer = accelc.compiler.load_tokenizer(saved)
    assert windows_of(tokenizer, ["w01 w02 w03", "w04 w05"], 2).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(InputError, match="0 tokens"):
        windows_of(tokenizer, [], 16)
    result = runner.invoke(app, ["train-heads", str(saved), str(tmp_path / "empty.txt")])
    assert result.exit_code == 1
    assert "InputError" in result.output


class NoTable(nn.Module):
    """Reads tokens as numbers; there is no table of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(1, 8), nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.inner(ids[..., None].float()).relu())


def test_settings_and_models_that_do_not_fit(tmp_path: Path) -> None:
    wrong = [
        {"steps": 0}, {"rows": 0}, {"accumulate": 0}, {"save_every": 0}, {"window": 4}, {"loss": "hope"},
        {"precision": "int3"}, {"decay": 0.0}, {"decay": 1.5}, {"rate": 0.0}, {"warmup": -1},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(InputError):
            replace(SMALL, **options)
    model = Counting(97)
    with pytest.raises(InputError, match="windows"):
        train_heads(model, text(length=8), SMALL, tmp_path / "h")
    with pytest.raises(InputError, match="no file can be written"):
        train_heads(model, text(), SMALL, tmp_path / "none" / "h")
    with pytest.raises(InputError, match="the loss is"):
        train_heads(model, text(), replace(SMALL, rate=1e30), tmp_path / "loss")
    with pytest.raises(InputError, match="no window"):
        train_heads(model, text(1), SMALL, tmp_path / "h")
    for options in ({"kind": "eagle"}, {"heads": 0}, {"layers": 0}):
        with pytest.raises(DraftError, match=next(iter(options))):
            replace(SMALL, **options)
    with pytest.raises(DraftError, match="no table"):
        train_heads(NoTable(), text() % 12, SMALL, tmp_path / "h")
    assert train_heads(NoTable(), text() % 12, replace(SMALL, kind=MEDUSA), tmp_path / "h").config.heads == 2
