"""Arguments of decoders, their calls and sessions: wrong names, types and ranges are named errors."""

import copy
import pickle

import numpy as np
import pytest
import torch

from accelc.ir.errors import (
    CopyError,
    EmptyBatchError,
    InputError,
    RankError,
    SamplingError,
    StopError,
    TokenizerError,
    TokenRangeError,
    UnknownOptionError,
)
from accelc.runtime import SamplingParams


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_unknown_options_are_listed_with_the_nearest_known_one(tiny, method):
    call = getattr(tiny.decoder(), method)
    with pytest.raises(UnknownOptionError, match=rf"decoder\.{method} has no option max_new_token, other\n") as raised:
        call([1], max_new_token=3, other=1)
    assert "Did you mean max_new_tokens?" in raised.value.remedy
    assert "Known: max_new_tokens, sampling, seed," in raised.value.remedy
    assert ("streamer" in raised.value.remedy) == (method == "generate")
    with pytest.raises(UnknownOptionError, match=r"sampling=accelc\.SamplingParams\(temperature=0\.5, top_k=3\)"):
        call([1], temperature=0.5, top_k=3)
    assert list(tiny.decoder().generate([1], max_new_tokens=2).tokens[0].shape) == [2]


def test_a_prompt_by_the_name_that_transformers_gives_it(tiny):
    with pytest.raises(UnknownOptionError, match="Give the prompt first, without a name"):
        tiny.decoder().generate(input_ids=[1])
    with pytest.raises(EmptyBatchError):
        tiny.decoder().generate()


def test_unknown_sampling_settings_are_named():
    with pytest.raises(UnknownOptionError, match=r"(?s)temprature.*Did you mean temperature\?.*repetition_penalty"):
        SamplingParams(temprature=1.0)
    params = SamplingParams(0.5, top_k=3)
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params != SamplingParams(0.5)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_new_tokens", 0, StopError),
        ("max_new_tokens", 2.0, StopError),
        ("max_new_tokens", True, StopError),
        ("max_new_tokens", "3", StopError),
        ("sampling", 3, SamplingError),
        ("sampling", {"temperature": 1.0}, SamplingError),
        ("sampling", "greedy", SamplingError),
        ("sampling", [SamplingParams()] * 2, SamplingError),
        ("seed", 1.5, SamplingError),
        ("seed", True, SamplingError),
        ("seed", -1, SamplingError),
        ("seed", [1, 2], SamplingError),
        ("seed", [None], SamplingError),
        ("stop_tokens", 1.5, StopError),
        ("stop_tokens", "a", StopError),
        ("stop_tokens", [-1], StopError),
        ("stop_tokens", [True], StopError),
        ("stop_tokens", {3: 4}, StopError),
        ("stop_tokens", [61], TokenRangeError),
        ("stop_strings", 3, StopError),
        ("stop_strings", [3], StopError),
        ("stop_strings", [""], StopError),
        ("stop_strings", "no tokenizer", StopError),
        ("ignore_eos", "yes", InputError),
        ("tokenizer", 3, InputError),
    ],
    ids=repr,
)
def test_wrong_values_are_refused_by_name(tiny, name, value, error):
    decoder = tiny.decoder()
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(error) as raised:
            call([1, 2], **{name: value})
        assert isinstance(raised.value, InputError)
        assert raised.value.remedy
    assert decoder.generate([1, 2], max_new_tokens=3).tokens[0].tolist() == tiny.greedy([1, 2], 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", v) for v in (-1, "1", float("nan"), float("inf"), None, True)),
        *(("top_k", v) for v in (-1, 1.5, "3")),
        *(("top_p", v) for v in (0, -0.1, 1.1, float("nan"))),
        *(("min_p", v) for v in (-0.1, 1.0)),
        *(("repetition_penalty", v) for v in (0, -1, float("inf"))),
    ],
    ids=repr,
)
def test_sampling_settings_have_ranges(name, value):
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**{"temperature": 1.0, name: value})


def test_integers_and_ids_may_come_from_numpy_and_torch(tiny):
    decoder, greedy = tiny.decoder(), tiny.greedy([1, 2], 8)
    assert decoder.generate([1, 2], max_new_tokens=np.int64(4)).tokens[0].tolist() == greedy[:4]
    first = greedy.index(greedy[3])
    for stop in (np.array([greedy[3]]), torch.tensor([greedy[3]]), np.int32(greedy[3]), (greedy[3],)):
        assert decoder.generate([1, 2], stop_tokens=stop).tokens[0].tolist() == greedy[: first + 1]
    result = decoder.generate([1, 2], max_new_tokens=2, seed=np.int64(7), sampling=SamplingParams(1.0))
    assert result.seeds == [7]


@pytest.mark.parametrize(
    ("eos", "error"),
    [(61, TokenRangeError), (-1, StopError), ("a", StopError), (1.5, StopError), ([1, True], StopError)],
)
def test_eos_is_checked_when_a_decoder_is_made(tiny, eos, error):
    with pytest.raises(error, match="eos"):
        tiny.decoder(eos=eos)
    assert tiny.decoder(eos=torch.tensor([3, 60])).eos == {3, 60}


@pytest.mark.parametrize("value", [0, -1, "a", 1.5, True])
def test_max_batch_is_checked_when_a_decoder_is_made(tiny, value):
    with pytest.raises(InputError, match="max_batch"):
        tiny.decoder(max_batch=value)


def test_wrong_arguments_of_a_session_and_a_result(tiny):
    decoder = tiny.decoder()
    with decoder.start([1, 2]) as session:
        for tokens in ([1], np.array([1]), 1):
            with pytest.raises(RankError, match="Pass a tensor"):
                session.step(tokens)
        with pytest.raises(InputError, match="valid is 3"):
            session.step(torch.tensor([1]), valid=3)
        for rows, lengths in ((0, 1), ([0.5], [1]), ([0], "1")):
            with pytest.raises(InputError, match="takes a list of integers"):
                session.rollback(rows, lengths)
        session.rollback(torch.tensor([0]), np.array([1]))
        assert session.lengths.tolist() == [1]
    with pytest.raises(InputError, match="side"):
        decoder.generate([1], max_new_tokens=2).padded(0, side="up")


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_decoders_sessions_and_streams_refuse_to_be_copied(tiny, attempt):
    decoder = tiny.decoder()
    session, stream = decoder.start([1]), decoder.stream([1], max_new_tokens=3)
    for thing in (decoder, session, stream):
        with pytest.raises(CopyError, match="compiles the model again"):
            attempt(thing)
    assert issubclass(CopyError, TypeError)  # what code that copies whatever it can expects of things that cannot be
    assert [event.token for event in stream] == tiny.greedy([1], 3)


def failing(after):
    """A tokenizer that raises at its `after`-th call."""
    calls = []

    def decode(ids):
        calls.append(ids)
        if len(calls) >= after:
            raise KeyError("unknown piece")
        return "x" * len(ids)

    return decode


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("how", ["generate", "stream", "streamer"])
def test_a_tokenizer_that_raises_is_named_and_the_decoder_stays_usable(tiny, after, how):
    decoder = tiny.decoder()
    with pytest.raises(TokenizerError, match="KeyError") as raised:
        if how == "stream":
            list(decoder.stream([1, 2], max_new_tokens=9, tokenizer=failing(after)))
        else:
            streamer = (lambda event: None) if how == "streamer" else None
            decoder.generate([1, 2], max_new_tokens=9, tokenizer=failing(after), streamer=streamer)
    assert isinstance(raised.value.__cause__, KeyError)
    assert "decoding the token ids [" in raised.value.where
    assert decoder.generate([1, 2], max_new_tokens=3).tokens[0].tolist() == tiny.greedy([1, 2], 3)


def test_a_tokenizer_without_text_is_named(tiny):
    with pytest.raises(TokenizerError, match="returned 3 and no text"):
        tiny.decoder().generate([1], max_new_tokens=2, tokenizer=lambda ids: 3)
