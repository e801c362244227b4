"""Bad input and bad luck: a named error each, and a decoder that is correct afterwards."""

import threading

import pytest
import torch
from tiny_decoder import Tiny, prompts_of

from accelc.ir.errors import (
    BatchSizeError,
    DTypeError,
    EmptyBatchError,
    EmptyPromptError,
    InputError,
    NonFiniteLogitsError,
    PromptTooLongError,
    RankError,
    TokenRangeError,
)

PROMPTS = prompts_of([4, 10, 7])


@pytest.fixture
def correct(tiny):
    """A check that a decoder still gives the right tokens."""
    expected = [tiny.greedy(p, 5) for p in PROMPTS]

    def check(decoder):
        assert [t.tolist() for t in decoder.generate(PROMPTS, max_new_tokens=5).tokens] == expected

    return check


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([1, 61], TokenRangeError),
        ([[1], [-1]], TokenRangeError),
        ([2**70], TokenRangeError),
        (torch.tensor([[1, 1000]]), TokenRangeError),
        ([[]], EmptyPromptError),
        ([[1], []], EmptyPromptError),
        (torch.zeros(0, dtype=torch.int64), EmptyPromptError),
        (torch.zeros(2, 0, dtype=torch.int64), EmptyPromptError),
        ([], EmptyBatchError),
        (torch.zeros(0, 3, dtype=torch.int64), EmptyBatchError),
        ([1] * 64, PromptTooLongError),
        ([[1], [1] * 65], PromptTooLongError),
        (torch.tensor([1.0, 2.0]), DTypeError),
        (torch.tensor([True, False]), DTypeError),
        (torch.tensor([1, 2], dtype=torch.uint8), DTypeError),
        ([1, 2.0], DTypeError),
        ([True], DTypeError),
        ([[1, None]], DTypeError),
        ([1, "a"], DTypeError),
        ("hello", DTypeError),
        (["hello", "you"], DTypeError),
        (torch.tensor(3), RankError),
        (torch.zeros(1, 1, 1, dtype=torch.int64), RankError),
        ([torch.zeros(1, 2, dtype=torch.int64)], RankError),
        ([[[1]]], RankError),
        ([1, [2]], RankError),
        (7, RankError),
        (torch.tensor([1, 2]).to_sparse(), InputError),
        (None, RankError),
        ([[1]] * 5, BatchSizeError),
    ],
    ids=repr,
)
def test_bad_prompts(tiny, correct, prompt, error, learned):
    decoder = tiny.decoder(max_batch=4, vocab_size=None if learned else 61)
    for call in (decoder.generate, decoder.stream, decoder.start):
        with pytest.raises(error):
            call(prompt)
    correct(decoder)


def test_prompt_and_new_tokens_beyond_max_length(tiny, correct):
    decoder = tiny.decoder()
    with pytest.raises(PromptTooLongError, match="row 1"):
        decoder.generate([[1], [1] * 60], max_new_tokens=5)
    assert len(decoder.generate([[1], [1] * 60], max_new_tokens=4).sequences[1]) == 64
    correct(decoder)


def test_the_error_names_row_and_remedy(tiny):
    with pytest.raises(TokenRangeError, match=r"token id 99 .* vocabulary of 61\n.*row 1\n.*remedy"):
        tiny.decoder().generate([[1], [2, 99]], max_new_tokens=2)


def test_nan_in_the_prefill(tiny, correct):
    decoder = tiny.decoder(chunk=4)
    tiny.poison = PROMPTS[1][-1]
    with pytest.raises(NonFiniteLogitsError, match="row 1, new token 0"):
        decoder.generate([PROMPTS[0][:1], PROMPTS[1]], max_new_tokens=5)
    tiny.poison = None
    correct(decoder)


@pytest.mark.parametrize("streamed", [False, True])
def test_nan_while_decoding(tiny, correct, streamed):
    tokens = tiny.greedy(PROMPTS[0], 8)
    fresh = next(i for i, t in enumerate(tokens) if t not in PROMPTS[0])
    decoder = tiny.decoder()
    tiny.poison = tokens[fresh]
    with pytest.raises(NonFiniteLogitsError, match=f"row 0, new token {fresh + 1}"):
        if streamed:
            list(decoder.stream(PROMPTS[0], max_new_tokens=8))
        else:
            decoder.generate(PROMPTS[0], max_new_tokens=8)
    tiny.poison = None
    correct(decoder)


def test_states_that_held_nan_are_not_used_again(tiny):
    decoder = tiny.decoder()
    decoder.generate(PROMPTS, max_new_tokens=2)
    tiny.poison = PROMPTS[0][0]
    with pytest.raises(NonFiniteLogitsError):
        decoder.generate(PROMPTS, max_new_tokens=2)
    tiny.poison = None
    for state in decoder._pool.take(3).states:
        assert state.isfinite().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", ["generate", "stream", "start"])
def test_an_interrupted_step(correct, error, call):
    class Interrupted(Tiny):
        after = 10**9

        def hidden(self, *args):
            out = super().hidden(*args)
            self.after -= 1
            if self.after == 0:
                raise error
            return out

    model = Interrupted()
    decoder = model.decoder(chunk=4)
    for model.after in (1, 2, 3):  # the third is a decode step, for start the last chunk
        with pytest.raises(error):
            if call == "start":
                decoder.start(PROMPTS)
            elif call == "stream":
                list(decoder.stream(PROMPTS[:1], max_new_tokens=5))
            else:
                decoder.generate(PROMPTS[:1], max_new_tokens=5)
    model.after = 10**9
    correct(decoder)


def test_threads_wait_for_each_other(tiny):
    """Eight threads, generating and streaming, all at once; the step itself watches that it is never entered twice."""
    inside = threading.Lock()
    plain = tiny.hidden

    def guarded(*args):
        assert inside.acquire(blocking=False), "two steps at a time"
        try:
            return plain(*args)
        finally:
            inside.release()

    tiny.hidden = guarded
    decoder = tiny.decoder()
    prompts = prompts_of([3, 6, 9, 12, 15, 18, 21, 24])
    expected = [tiny.greedy(p, 10) for p in prompts]
    found: list[object] = [None] * 8
    start = threading.Barrier(8)

    def work(index):
        start.wait()
        if index % 2:
            found[index] = [event.token for event in decoder.stream(prompts[index], max_new_tokens=10)]
        else:
            found[index] = decoder.generate(prompts[index], max_new_tokens=10).tokens[0].tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
