"""What the benchmark's peers share: the clock, and the decoding loop over one static cache."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

from peers import Clock, timed
from peers.static_loop import static_loop
from shapes import SHAPES, prompt

from accelc.demo.contenders import transformers_eager


def test_clock_counts_from_its_making(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    for token in (7, 8, 9):
        clock.add(token)
    found = clock.timed(3)
    assert found.tokens == (7, 8, 9)
    assert (found.first_token_seconds, found.total_seconds) == (2.0, 3.0)
    assert found.tokens_per_second == 2.0  # two tokens in the second after the first one


@pytest.mark.parametrize("asked", [1, 3])
def test_clock_wants_as_many_tokens_as_were_asked_for(asked: int) -> None:
    clock = Clock()
    clock.add(1)
    clock.add(2)
    with pytest.raises(ValueError, match=f"2 tokens were decoded, {asked} were asked for"):
        clock.timed(asked)


def test_no_token_is_made_beyond_the_last_asked_for() -> None:
    made = []

    def stream() -> Iterator[int]:
        for token in range(100):
            made.append(token)
            yield token

    assert timed(stream(), 4).tokens == (0, 1, 2, 3)
    assert made == [0, 1, 2, 3]


def test_static_loop_decodes_as_generate_does_again_and_again() -> None:
    """The cache is reused: a prompt leaves nothing behind for the next, shorter or longer."""
    torch.manual_seed(0)
    config = SHAPES["tiny"].config(24)
    config.tie_word_embeddings = False  # tied, a model as small as this repeats one token
    model = LlamaForCausalLM(config).eval()
    expected = transformers_eager(model)
    decode = static_loop(model, 24, backend="eager")
    for seed, tokens in enumerate((12, 5, 16)):
        ids = prompt(SHAPES["tiny"], tokens, seed=seed)
        found = decode(ids, 8)
        assert found.tokens == expected(ids, 8).tokens
        assert len(set(found.tokens)) > 2
    assert torch.is_grad_enabled()
