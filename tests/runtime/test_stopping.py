"""Every way a row ends: where it is cut, what it is called, and which condition wins."""

import pytest
from tiny_decoder import Tiny, prompts_of

from accelc.ir.errors import StopError
from accelc.runtime import FinishReason

PROMPT = prompts_of([5])[0]
FREE = Tiny().greedy(PROMPT, 20)
"""Twenty greedy tokens after the prompt."""
LATER = next(i for i in range(3, 20) if FREE[i] not in FREE[:i])
"""Where a token first appears, some way in."""


def words(ids):
    """A tokenizer whose tokens are words; token 7 reads "<7>"."""
    return "".join(f"<{i}>" for i in ids)


def test_max_new_tokens_is_exact(tiny):
    for count in (1, 2, 20):
        result = tiny.decoder().generate(PROMPT, max_new_tokens=count)
        assert result.tokens[0].tolist() == FREE[:count]
        assert result.finish_reasons == [FinishReason.LENGTH]


def test_eos_is_included_and_can_be_ignored(tiny):
    decoder = tiny.decoder(eos=[60, FREE[LATER]])
    result = decoder.generate(PROMPT, max_new_tokens=20, tokenizer=words)
    assert result.tokens[0].tolist() == FREE[: LATER + 1]
    assert result.finish_reasons == [FinishReason.EOS]
    assert result.texts == [words(FREE[:LATER])]
    result = decoder.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    assert result.tokens[0].tolist() == FREE


def test_several_stop_tokens(tiny):
    result = tiny.decoder().generate(PROMPT, max_new_tokens=20, stop_tokens=[60, FREE[LATER]])
    assert result.tokens[0].tolist() == FREE[: LATER + 1]
    assert result.finish_reasons == [FinishReason.STOP_TOKEN]
    assert tiny.decoder(eos=FREE[LATER]).generate(
        PROMPT, max_new_tokens=20, stop_tokens=FREE[LATER]
    ).finish_reasons == [FinishReason.EOS]


def test_stop_strings_across_tokens(tiny):
    """The text ends before the string, the tokens with the one that completes it."""
    string = f"{FREE[LATER - 1]}><{FREE[LATER]}"
    result = tiny.decoder().generate(PROMPT, max_new_tokens=20, stop_strings=["nowhere", string], tokenizer=words)
    assert result.finish_reasons == [FinishReason.STOP_STRING]
    assert result.tokens[0].tolist() == FREE[: LATER + 1]
    assert result.texts == [words(FREE[: LATER - 1]) + "<"]


def test_a_stop_string_in_the_prompt_does_not_count(tiny):
    string = words([PROMPT[-1]])
    result = tiny.decoder(tokenizer=words).generate(PROMPT, max_new_tokens=LATER, stop_strings=string)
    assert (result.finish_reasons == [FinishReason.STOP_STRING]) == (PROMPT[-1] in FREE[:LATER])


def test_a_stop_string_with_the_last_token_wins_over_the_length(tiny):
    result = tiny.decoder(tokenizer=words).generate(PROMPT, max_new_tokens=LATER + 1, stop_strings=words([FREE[LATER]]))
    assert result.finish_reasons == [FinishReason.STOP_STRING]


def test_tokenizer_objects(tiny):
    class Words:
        decode = staticmethod(words)

    result = tiny.decoder(tokenizer=Words()).generate(PROMPT, max_new_tokens=4)
    assert result.texts == [words(FREE[:4])]
    assert repr(words(FREE[:4])) in str(result)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"stop_tokens": [-1]},
        {"stop_tokens": [1.5]},
        {"stop_strings": [""], "tokenizer": words},
        {"stop_strings": [3], "tokenizer": words},
        {"stop_strings": ["x"]},
    ],
    ids=lambda options: " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()),
)
def test_wrong_conditions(tiny, options):
    decoder = tiny.decoder()
    with pytest.raises(StopError):
        decoder.generate(PROMPT, **options)
    with pytest.raises(StopError):
        decoder.stream(PROMPT, **options)
    assert decoder.generate(PROMPT, max_new_tokens=5).tokens[0].tolist() == FREE[:5]
