"""Greedy generation equals recomputing the whole text for every token."""

import pytest
import torch
from tiny_decoder import VOCAB, Tiny, prompts_of

from accelc.ir.errors import InputError
from accelc.runtime import Decoder, FinishReason, cache_capacity

LENGTHS = [1, 5, 8, 9, 30]


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
def test_rows_of_different_lengths(tiny, chunk, prefill):
    prompts = prompts_of(LENGTHS)
    result = tiny.decoder(chunk=chunk, prefill=prefill).generate(prompts, max_new_tokens=6)
    assert [t.tolist() for t in result.tokens] == [tiny.greedy(p, 6) for p in prompts]


def test_the_prefill_callable_takes_all_chunks_but_single_tokens(tiny):
    tiny.decoder(chunk=4).generate(prompts_of([9]), max_new_tokens=2)
    assert tiny.calls == [("prefill", 4), ("prefill", 4), ("decode", 1), ("decode", 1)]
    tiny.calls.clear()
    tiny.decoder(chunk=4, prefill=False).generate(prompts_of([6]), max_new_tokens=1)
    assert tiny.calls == [("many", 4), ("many", 2)]


def test_up_to_max_length_and_no_further(tiny):
    """Position tables have exactly max_length rows, and rows that end early are padded behind theirs."""
    prompts = prompts_of([63, 2, 58])
    result = tiny.decoder(chunk=16).generate(prompts)
    assert [len(s) for s in result.sequences] == [64, 64, 64]
    assert [t.tolist() for t in result.tokens] == [tiny.greedy(p, 64 - len(p)) for p in prompts]
    assert result.finish_reasons == [FinishReason.LENGTH] * 3


def test_rows_that_ended_do_not_disturb_the_others(tiny):
    prompts = prompts_of([3, 4, 5])
    free = [tiny.greedy(p, 12) for p in prompts]
    eos = free[0][2]
    result = tiny.decoder(eos=eos).generate(prompts, max_new_tokens=12)
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert [t.tolist() for t in result.tokens] == cut
    assert result.finish_reasons == [FinishReason.EOS if eos in row else FinishReason.LENGTH for row in free]


def test_states_are_reused_across_calls_and_batch_sizes(tiny):
    decoder = tiny.decoder()
    prompts = prompts_of([7, 12, 3])
    for batch in (prompts, prompts[:1], prompts[1:], prompts[2:], prompts):
        result = decoder.generate(batch, max_new_tokens=4)
        assert [t.tolist() for t in result.tokens] == [tiny.greedy(p, 4) for p in batch]


def test_states_are_allocated_once(tiny, monkeypatch):
    decoder = tiny.decoder()
    decoder.generate(prompts_of([2, 3]), max_new_tokens=2)
    monkeypatch.setattr(type(decoder.steps), "allocate", lambda *_: pytest.fail("allocated again"))
    decoder.generate(prompts_of([4]), max_new_tokens=2)
    decoder.generate(prompts_of([4, 1]), max_new_tokens=2)


@pytest.mark.parametrize(
    "form",
    [
        lambda p: p,
        lambda p: torch.tensor(p),
        lambda p: torch.tensor(p, dtype=torch.int32),
        lambda p: [p],
        lambda p: torch.tensor([p]),
        lambda p: [torch.tensor(p)],
        lambda p: (tuple(p),),
    ],
)
def test_forms_of_a_prompt(tiny, form):
    prompt = prompts_of([6])[0]
    result = tiny.decoder().generate(form(prompt), max_new_tokens=3)
    assert [t.tolist() for t in result.tokens] == [tiny.greedy(prompt, 3)]
    assert result.sequences[0].tolist() == prompt + tiny.greedy(prompt, 3)


def test_the_vocabulary_is_learned_from_the_logits(tiny):
    assert tiny.decoder(vocab_size=None).vocab_size == VOCAB


def test_the_lowest_id_wins_a_tie_in_every_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        logits = torch.full((2, 1, 100), -1.0, dtype=dtype)
        logits[0, 0, [40, 17, 99]] = 3.0
        decoder = Decoder(lambda *_, logits=logits: (logits,), None, [], max_length=8, vocab_size=100)
        result = decoder.generate([[1], [1]], max_new_tokens=2)
        assert [t.tolist() for t in result.tokens] == [[17, 17], [0, 0]]


def test_results(tiny):
    result = tiny.decoder().generate(prompts_of([2, 4]), max_new_tokens=3, stop_tokens=())
    assert result.padded(60).shape == (2, 7)
    assert result.padded(60)[0, 5:].tolist() == [60, 60]
    assert result.padded(60, side="left")[0, :2].tolist() == [60, 60]
    assert result.padded(60, prompt=False).tolist() == [t.tolist() for t in result.tokens]
    stats = result.statistics
    assert (stats.prompt_tokens, stats.new_tokens, stats.steps) == (6, 6, 2)
    assert 0 < stats.prefill_seconds <= stats.first_token_seconds < stats.total_seconds
    assert stats.decode_tokens_per_second == pytest.approx(4 / (stats.total_seconds - stats.first_token_seconds))
    assert not result.tokens[0].is_inference()
    lines = str(result).splitlines()
    assert len(lines) == 5
    assert "length" in lines[1]
    assert "prefill" in lines[3]


def test_capacity_covers_the_padding():
    assert cache_capacity(100, 156) == 256
    assert cache_capacity(101, 156) == 320
    assert cache_capacity(64, 28) == 192  # a tree of 128 nodes
    with pytest.raises(InputError, match="capacity"):
        Tiny().decoder(chunk=8, capacity=64)
