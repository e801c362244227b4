"""Streams and streamers see what generate returns, in order, and leave the decoder in order however they end."""

import gc

import pytest
import torch
from tiny_decoder import VOCAB, prompts_of
from transformers.generation.streamers import BaseStreamer

from accelc.ir.errors import StreamerError
from accelc.runtime import FinishReason, SamplingParams

PROMPTS = prompts_of([3, 9])


def as_bytes(ids):
    """Token i is the i-th byte of a text with characters of one to four bytes, so that they split across tokens."""
    alphabet = "aé漢🙂 <end> bcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST".encode()
    assert len(alphabet) >= VOCAB
    return bytes(alphabet[i % len(alphabet)] for i in ids).decode("utf-8", errors="replace")


def test_events_equal_the_result(tiny):
    decoder = tiny.decoder(tokenizer=as_bytes, eos=tiny.greedy(PROMPTS[0], 6)[-1])
    options = {"max_new_tokens": 15, "sampling": [SamplingParams(), SamplingParams(temperature=3.0)], "seed": 4}
    expected = decoder.generate(PROMPTS, **options)
    stream = decoder.stream(PROMPTS, **options)
    events = list(stream)
    for row in range(2):
        mine = [e for e in events if e.row == row]
        assert [e.token for e in mine] == expected.tokens[row].tolist()
        assert "".join(e.text for e in mine) == expected.texts[row]
        assert [e.finish_reason for e in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == expected.finish_reasons[row]
    result = stream.result
    assert [t.tolist() for t in result.tokens] == [t.tolist() for t in expected.tokens]
    assert result.texts == expected.texts
    assert result.finish_reasons == expected.finish_reasons


def test_closing_early(tiny, monkeypatch):
    decoder = tiny.decoder()
    free = [tiny.greedy(p, 10) for p in PROMPTS]
    with decoder.stream(PROMPTS, max_new_tokens=10) as stream:
        taken = [next(stream).token for _ in range(5)]
    assert taken == [free[0][0], free[1][0], free[0][1], free[1][1], free[0][2]]
    assert list(stream) == []
    assert stream.result.finish_reasons == [FinishReason.CANCELLED] * 2
    assert [t.tolist() for t in stream.result.tokens] == [row[:3] for row in free]
    # The states came back, and are fit for use.
    monkeypatch.setattr(type(decoder.steps), "allocate", lambda *_: pytest.fail("allocated again"))
    assert decoder.generate(PROMPTS, max_new_tokens=10).tokens[1].tolist() == free[1]


def test_dropping_a_stream_gives_its_states_back(tiny, monkeypatch):
    decoder = tiny.decoder()
    for _ in decoder.stream(PROMPTS, max_new_tokens=10):
        break
    gc.collect()
    monkeypatch.setattr(type(decoder.steps), "allocate", lambda *_: pytest.fail("allocated again"))
    assert decoder.generate(PROMPTS, max_new_tokens=3).tokens[0].tolist() == tiny.greedy(PROMPTS[0], 3)


def test_streams_interleave(tiny):
    decoder = tiny.decoder()
    pairs = list(
        zip(decoder.stream(PROMPTS[0], max_new_tokens=8), decoder.stream(PROMPTS[1], max_new_tokens=8), strict=True)
    )
    assert [a.token for a, _ in pairs] == tiny.greedy(PROMPTS[0], 8)
    assert [b.token for _, b in pairs] == tiny.greedy(PROMPTS[1], 8)


def test_grad_mode_does_not_leak_to_the_consumer(tiny):
    for _ in tiny.decoder().stream(PROMPTS, max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


class Recorder(BaseStreamer):
    """Keeps what transformers' protocol hands it."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_a_transformers_streamer(tiny):
    recorder = Recorder()
    free = [tiny.greedy(p, 6) for p in PROMPTS]
    eos = free[0][2]
    assert eos not in free[1]
    tiny.decoder(eos=eos).generate(PROMPTS, max_new_tokens=6, streamer=recorder)
    at = free[0].index(eos)
    assert recorder.values[0] == [[eos] * 6 + PROMPTS[0], PROMPTS[1]]
    assert recorder.values[1:] == [[free[0][i] if i <= at else eos, free[1][i]] for i in range(6)]
    assert recorder.ended == 1


def test_a_callback_gets_the_events(tiny):
    decoder = tiny.decoder(tokenizer=as_bytes)
    events = []
    decoder.generate(PROMPTS, max_new_tokens=6, streamer=events.append)
    assert events == list(decoder.stream(PROMPTS, max_new_tokens=6))


def test_a_callback_may_call_the_decoder(tiny):
    decoder, inner = tiny.decoder(), []
    result = decoder.generate(
        PROMPTS[0],
        max_new_tokens=4,
        streamer=lambda event: inner.append(decoder.generate(PROMPTS[1], max_new_tokens=3).tokens[0].tolist()),
    )
    assert result.tokens[0].tolist() == tiny.greedy(PROMPTS[0], 4)
    assert inner == [tiny.greedy(PROMPTS[1], 3)] * 4


@pytest.mark.parametrize("at", ["first put", "third put", "end", "callback"])
def test_an_exception_in_a_streamer(tiny, at):
    class Failing(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.values) == {"first put": 1, "third put": 3}.get(at):
                raise OSError("disk full")

        def end(self):
            if at == "end":
                raise OSError("disk full")

    def callback(event):
        raise OSError("disk full")

    decoder = tiny.decoder()
    with pytest.raises(StreamerError, match="disk full") as caught:
        decoder.generate(PROMPTS, max_new_tokens=6, streamer=callback if at == "callback" else Failing())
    assert isinstance(caught.value.__cause__, OSError)
    assert decoder.generate(PROMPTS, max_new_tokens=6).tokens[1].tolist() == tiny.greedy(PROMPTS[1], 6)


def test_what_is_no_streamer(tiny):
    with pytest.raises(StreamerError, match="no streamer"):
        tiny.decoder().generate(PROMPTS, max_new_tokens=2, streamer="stdout")
