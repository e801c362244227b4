"""The families sweep judges rightly: causality, other mixing, wrong decoders, stopped processes, and the counts."""

import multiprocessing as mp
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

from family_causality import TokensDoNotReach, causality_breach
from family_configs import VOCABULARY
from family_export import export, sequence_mixers
from family_models import TokensToLogits, small_model, text
from family_outcome import Outcome, derive_and_check, greedy_difference, library_agrees
from family_probe import Row, probe
from family_report import summary, verdict, write_markdown
from family_sweep import Running, child, collect

WIDTH = 8


class Toy(nn.Module):
    """ids [B, T] -> logits [B, T, V] with one function on hidden states [B, T, D] and ids in between."""

    def __init__(self, mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3)
        self.mix = mix

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.mix(self, x, ids))


def average(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    t = x.shape[1]
    return torch.ones(t, t).tril().softmax(-1) @ x


def causal_average(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    t = x.shape[1]
    return torch.zeros(t, t).masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf")).softmax(-1) @ x


def picked_average(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Exports only with min(4, T) <= T as an assertion."""
    t = x.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    scores = (x @ x.transpose(1, 2)).masked_fill(~causal, float("-inf"))
    hidden = torch.ones_like(scores, dtype=torch.bool).scatter(-1, scores.topk(min(4, t), dim=-1).indices, False)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ x


def nothing(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(x)


def whole_sum(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def over_length(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return causal_average(m, x, ids) / x.shape[1]


def over_rows(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return causal_average(m, x.mean(0, keepdim=True), ids)


def without_padding(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Counts the tokens that are no padding over the whole sequence."""
    return causal_average(m, x, ids) * (ids != 0).sum(1)[:, None, None] / x.shape[1]


def convolution(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return m.convolution(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


def running_sum(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return x.cumsum(1)


def shift(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def counted_positions(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    counted = (ids != 0).long().cumsum(1) % VOCABULARY
    return causal_average(m, x + m.embed(counted), ids)


@pytest.mark.parametrize(
    ("mix", "breach"),
    [
        (causal_average, ""),
        (running_sum, ""),
        (average, "a later token changes earlier logits"),
        (whole_sum, "a later token changes earlier logits"),
        (over_length, "when the sequence is longer"),
        (over_rows, "another row's logits"),
        (without_padding, "(with special tokens)"),
    ],
)
def test_breaches_of_causality_are_told(mix, breach: str) -> None:
    found = causality_breach(Toy(mix))
    assert bool(found) == bool(breach)
    assert breach in found


def test_a_model_without_mixing_is_no_evidence() -> None:
    with pytest.raises(TokensDoNotReach):
        causality_breach(Toy(nothing))


@pytest.mark.parametrize(
    ("mix", "mixers"),
    [
        (causal_average, []),
        (picked_average, []),
        (counted_positions, []),
        (running_sum, ["cumsum.default"]),
        (convolution, ["pad.default", "conv1d.default"]),
        (shift, ["pad.default"]),
    ],
)
def test_other_mixing_is_seen(mix, mixers: list[str]) -> None:
    assert sequence_mixers(export(Toy(mix).eval(), text(2, 11))) == mixers


@pytest.fixture(scope="module")
def model() -> TokensToLogits:
    return TokensToLogits(small_model("llama")).eval()


def test_a_derived_decoder_is_judged_so(model: TokensToLogits) -> None:
    outcome, reason, sequences = derive_and_check(model)
    assert (outcome, reason) == (Outcome.DERIVED, "")
    assert library_agrees(model, sequences)
    sequences[1][-1] = (sequences[1][-1] + 1) % VOCABULARY
    assert library_agrees(model, sequences) is False
    prompts = [sequence[:length] for sequence, length in zip(sequences, (5, 13), strict=True)]
    assert "after a prompt of 13" in greedy_difference(model, prompts, sequences)


@pytest.mark.parametrize("part", ["embed_tokens.weight", "layers.1.self_attn.k_proj.weight", "norm.weight"])
def test_a_wrong_decoder_is_judged_silently_wrong(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The decoder has the weights of another model in one place, as one that reads the wrong values would."""
    import accelc

    right = TokensToLogits(small_model("llama")).eval()
    wrong = small_model("llama").eval()
    wrong.get_parameter(f"model.{part}").data.mul_(1.05)
    compiled = accelc.compile
    monkeypatch.setattr(accelc, "compile", lambda _, **options: compiled(wrong, **options))
    assert derive_and_check(right)[0] is Outcome.WRONG


def test_a_row_of_each_stage() -> None:
    assert verdict(probe("gemma4_assistant")) == "does not build"
    row = probe("gpt2", derive=False)
    assert row.eligible
    assert verdict(row) == "exports"


def _crash(model_type: str, **_: object) -> Row:
    os._exit(7)


def _hang(model_type: str, **_: object) -> Row:
    time.sleep(600)
    return Row(model_type)


def _answer(model_type: str, **_: object) -> Row:
    return Row(model_type, builds=True, runs=True, causal=True, exports=True, mixers=[], outcome="derived")


def run_child(run, timeout: float) -> Row:
    receiver, sender = mp.Pipe(duplex=False)
    process = mp.get_context("fork").Process(target=child, args=("llama", True, sender, run))
    process.start()
    sender.close()
    entry = Running("llama", process, 0.0)
    row = collect(receiver, entry, timed_out=not receiver.poll(timeout), timeout=timeout)
    assert not process.is_alive()
    return row


def test_stopped_processes_are_marked() -> None:
    assert verdict(run_child(_answer, 60)) == "derived"
    crashed = run_child(_crash, 60)
    assert verdict(crashed) == "crashed"
    assert "code 7" in crashed.reason
    late = run_child(_hang, 1)
    assert verdict(late) == "timed out"
    assert late.seconds == 1


def rows() -> list[Row]:
    passed: dict = {"builds": True, "runs": True, "causal": True, "exports": True, "mixers": []}
    return [
        Row("a", **passed, outcome="derived", library=True, commit="abc"),
        Row("b", **passed, outcome="derived", library=False, commit="abc"),
        Row("c", **passed, outcome="refused", reason="x | y", commit="abd"),
        Row("d", **{**passed, "mixers": ["conv1d.default"]}, outcome="refused"),
        Row("e", **{**passed, "exports": False, "mixers": None}, outcome="derived", library=None),
        Row("f", **{**passed, "causal": False}, outcome="not causal"),
        Row("g", **{**passed, "causal": False}, outcome="silently wrong"),
        Row("h"),
        Row("i", stopped="timed out"),
    ]


def test_counts_are_of_what_is_eligible() -> None:
    page = summary(rows())
    assert "9 types" in page
    assert "3 derived, 2 refused, 1 not causal, 1 silently wrong, 1 does not build, 1 timed out" in page
    assert "3 are causal, export with a dynamic length and mix tokens by attention only" in page
    assert "of these 2 were derived (66.7%)**; not derived: c." in page
    assert "Of the other 6, 2 are not causal" in page
    assert "Silently wrong: 1" in page


def test_page_names_commits_versions_and_what_is_missing(tmp_path: Path) -> None:
    write_markdown(rows(), tmp_path / "page.md", 12)
    page = (tmp_path / "page.md").read_text()
    assert "commit abc, abd" in page
    assert f"torch {torch.__version__.partition('+')[0]}" in page
    assert "Only 9 of the 12" in page
    assert "for 1 of the derived; 1 cannot be generated from token ids so; for b it gives other ones" in page
    assert "| c | yes | yes | none | refused | x \\| y |" in page
    write_markdown(rows(), tmp_path / "whole.md", 9)
    assert "Only" not in (tmp_path / "whole.md").read_text()
