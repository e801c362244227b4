"""Where two continuations part is found with its margin, and times are read off correctly."""

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accelc.demo.compare import first_difference, table
from accelc.demo.contenders import Contender, Timed, interleave, make_ready, transformers_eager

PROMPT = torch.tensor([[5, 9, 2, 7]])


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config).eval()


def greedy_without_cache(model: LlamaForCausalLM, new_tokens: int) -> tuple[int, ...]:
    ids = PROMPT
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, PROMPT.shape[1] :].tolist())


def test_eager_decodes_greedily_beyond_the_end_token() -> None:
    model = tiny_model()
    tokens = greedy_without_cache(model, 24)
    model.generation_config.eos_token_id = tokens[4]  # transformers alone would stop here
    timed = transformers_eager(model)(PROMPT, 24)
    assert timed.tokens == tokens
    assert 0 < timed.first_token_seconds < timed.total_seconds


def test_equal_continuations_have_no_difference() -> None:
    assert first_difference(tiny_model(), PROMPT, [1, 2], [1, 2]) is None


def test_a_difference_has_the_reference_margin() -> None:
    model = tiny_model()
    expected = greedy_without_cache(model, 6)
    actual = (*expected[:4], (expected[4] + 1) % 50, 0)
    difference = first_difference(model, PROMPT, expected, actual)
    assert difference is not None
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT[0].tolist(), *expected[:4]]])).logits[0, -1]
    assert (difference.index, difference.expected, difference.actual) == (4, expected[4], actual[4])
    assert abs(difference.margin - (logits[expected[4]] - logits[actual[4]]).item()) < 1e-6
    assert difference.is_tie == (difference.margin <= 1e-3)
    assert difference.margin > 0


def test_a_missing_token_is_a_difference_and_no_tie() -> None:
    difference = first_difference(tiny_model(), PROMPT, [1, 2, 3], [1, 2])
    assert difference is not None
    assert difference.index == 2
    assert not difference.is_tie


def test_rate_leaves_the_first_token_out() -> None:
    assert Timed((1, 2, 3, 4, 5), first_token_seconds=1.0, total_seconds=3.0).tokens_per_second == 2.0


def test_contenders_take_turns_and_report_medians() -> None:
    order: list[str] = []

    def contender(name: str, seconds: list[float]) -> Contender:
        times = iter(seconds)

        def generate(_: torch.Tensor, new_tokens: int) -> Timed:
            order.append(name)
            return Timed(tuple(range(new_tokens)), 0.5, 0.5 + next(times))

        return Contender(name, generate, 0.0)

    slow, fast = contender("slow", [2.0, 4.0, 100.0]), contender("fast", [1.0, 1.0, 1.0])
    interleave([slow, fast], PROMPT, new_tokens=9, repeats=3)
    assert order == ["slow", "fast"] * 3
    assert slow.tokens_per_second == 2.0
    assert fast.tokens_per_second == 8.0
    cells = [list(column.cells) for column in table([slow, fast], "t").columns]
    assert cells[:3] == [["slow", "fast"], ["2.0", "8.0"], ["1.00x", "4.00x"]]


def test_compile_time_is_what_the_first_generation_took_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    durations = iter([7.0, 2.0])

    def generate(_: torch.Tensor, new_tokens: int) -> Timed:
        duration = next(durations)
        clock[0] += duration
        return Timed(tuple(range(new_tokens)), 0.0, duration)

    started = time.perf_counter()
    clock[0] += 10.0  # building it
    assert make_ready("x", generate, started, PROMPT, 2).compile_seconds == 10.0 + 7.0 - 2.0
