"""Sessions: stepping, padding and rolling back give the logits of a fresh run, and mistakes leave them as they were."""

import pytest
import torch
from tiny_decoder import prompts_of

from accelc.ir.errors import (
    BatchSizeError,
    DTypeError,
    InputError,
    NonFiniteLogitsError,
    PromptTooLongError,
    RankError,
    SessionClosedError,
    TokenRangeError,
)

PROMPTS = prompts_of([5, 11])


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_logits_after_the_prompts(tiny):
    session = tiny.decoder().start(PROMPTS)
    assert session.lengths.tolist() == [5, 11]
    for row, prompt in enumerate(PROMPTS):
        same(session.logits[row], tiny.forward(torch.tensor(prompt))[-1])


def test_steps_of_one_and_of_several_tokens(tiny):
    session = tiny.decoder().start(PROMPTS)
    new = torch.tensor(prompts_of([6, 6], seed=2))
    logits = torch.cat([session.step(new[:, 0]), session.step(new[:, 1:5]), session.step(new[:, 5:])], dim=1)
    for row, prompt in enumerate(PROMPTS):
        same(logits[row], tiny.forward(torch.tensor(prompt + new[row].tolist()))[len(prompt) :])


def test_rollback_then_continue_equals_a_fresh_run(tiny):
    session = tiny.decoder().start(PROMPTS)
    session.step(torch.tensor(prompts_of([4, 4], seed=3)))
    session.rollback([0, 1], [3, 13])
    assert session.logits.numel() == 0  # nobody should choose by logits of tokens that are gone
    kept = session.lengths.tolist()
    assert kept == [3, 13]
    new = torch.tensor(prompts_of([3, 3], seed=4))
    texts = [(p + e)[:k] for p, e, k in zip(PROMPTS, prompts_of([4, 4], seed=3), kept)]
    logits = session.step(new)
    for row, text in enumerate(texts):
        same(logits[row], tiny.forward(torch.tensor(text + new[row].tolist()))[len(text) :])


def test_valid_counts_commit_a_part(tiny):
    session = tiny.decoder().start(PROMPTS)
    new = torch.tensor(prompts_of([4, 4], seed=5))
    logits = session.step(new, valid=[2, 0])
    assert session.lengths.tolist() == [7, 11]
    same(logits[0, :2], tiny.forward(torch.tensor(PROMPTS[0] + new[0, :2].tolist()))[5:])
    follow = session.step(torch.tensor([9, 8]))
    same(follow[1, 0], tiny.forward(torch.tensor([*PROMPTS[1], 8]))[-1])
    same(follow[0, 0], tiny.forward(torch.tensor([*PROMPTS[0], *new[0, :2].tolist(), 9]))[-1])


def test_extend_appends_turns_of_different_lengths(tiny):
    session = tiny.decoder(chunk=4).start(PROMPTS)
    turns = prompts_of([9, 2], seed=6)
    logits = session.extend(turns)
    for row in range(2):
        same(logits[row], tiny.forward(torch.tensor(PROMPTS[row] + turns[row]))[-1])


def test_sessions_do_not_share_states(tiny):
    decoder = tiny.decoder()
    first, second = decoder.start(PROMPTS), decoder.start(PROMPTS[::-1])
    decoder.generate(prompts_of([20, 20]), max_new_tokens=3)
    logits = [session.step(torch.tensor([4, 7])) for session in (first, second)]
    same(logits[0][0, 0], tiny.forward(torch.tensor([*PROMPTS[0], 4]))[-1])
    same(logits[1][0, 0], tiny.forward(torch.tensor([*PROMPTS[1], 4]))[-1])


def test_closing_gives_the_states_back(tiny, monkeypatch):
    decoder = tiny.decoder()
    with decoder.start(PROMPTS) as session:
        pass
    with pytest.raises(SessionClosedError):
        session.step(torch.tensor([1, 2]))
    monkeypatch.setattr(type(decoder.steps), "allocate", lambda *_: pytest.fail("allocated again"))
    decoder.start(PROMPTS).close()


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda s: s.step(torch.tensor([1, 61])), TokenRangeError),
        (lambda s: s.step(torch.tensor([1, -1])), TokenRangeError),
        (lambda s: s.step(torch.tensor([1.0, 2.0])), DTypeError),
        (lambda s: s.step(torch.tensor([1, 2, 3])), RankError),
        (lambda s: s.step(torch.zeros(2, 9, dtype=torch.int64)), RankError),
        (lambda s: s.step(torch.tensor([1, 2]), valid=[2, 1]), InputError),
        (lambda s: s.step(torch.tensor([1, 2]), valid=[1]), BatchSizeError),
        (lambda s: s.extend([[1] * 3, [1] * 54]), PromptTooLongError),
        (lambda s: s.extend([[1]]), BatchSizeError),
        (lambda s: s.rollback([0], [6]), InputError),
        (lambda s: s.rollback([2], [1]), InputError),
        (lambda s: s.rollback([0, 1], [1]), InputError),
        (lambda s: s.rollback([0, 0], [2, 1]), InputError),
    ],
)
def test_mistakes_change_nothing(tiny, act, error):
    session = tiny.decoder().start(PROMPTS)
    with pytest.raises(error):
        act(session)
    assert session.lengths.tolist() == [5, 11]
    same(session.step(torch.tensor([4, 7]))[1, 0], tiny.forward(torch.tensor([*PROMPTS[1], 7]))[-1])


def test_nan_is_reported_and_leaves_no_trace(tiny):
    session = tiny.decoder().start(PROMPTS)
    tiny.poison = 33
    with pytest.raises(NonFiniteLogitsError, match="rows \\[1\\]"):
        session.step(torch.tensor([[1, 2], [3, 33]]))
    with pytest.raises(NonFiniteLogitsError):
        session.extend([[1] * 20, [*range(15), 33]])
    tiny.poison = None
    assert session.lengths.tolist() == [5, 11]
    for state in session._states:
        assert state.isfinite().all()
    same(session.step(torch.tensor([4, 7]))[1, 0], tiny.forward(torch.tensor([*PROMPTS[1], 7]))[-1])


def test_prompts_share_a_few_prefill_widths():
    from accelc.runtime.session import round_up

    assert [round_up(n, 256) for n in (1, 2, 3, 9, 16, 17, 33, 250, 256)] == [1, 2, 4, 16, 16, 32, 48, 256, 256]
    assert round_up(9, 10) == 10
    assert all(n <= round_up(n, 64) <= 64 for n in range(1, 65))


def test_the_sessions_logits_follow_its_steps(tiny):
    session = tiny.decoder().start([[1, 2, 3], [4, 5]])
    second = session.logits[1].clone()
    logits = session.step(torch.tensor([[6, 7], [8, 9]]), valid=[2, 0])
    same(session.logits[0], logits[0, 1])
    same(session.logits[1], second)
