"""What the compiler makes of one model, judged by a comparison of its own with the original forward."""

from __future__ import annotations

import enum

import torch
from family_models import TokensToLogits, text
from torch import Tensor

MAX_LENGTH = 96
NEW_TOKENS = 16
PROMPTS = (5, 13)  # lengths: on either side of the windows
CHUNKS = (1, 3, 1, 8, 2, 5, 1)  # tokens per step in the comparison at every position
TOLERANCE = 1e-3  # of the logits' spread
TIE = 1e-3  # two logits closer than this share of the spread may swap


class Outcome(enum.Enum):
    """How a compilation ended."""

    DERIVED = "derived"
    REFUSED = "refused"
    NOT_CAUSAL = "not causal"
    WRONG = "silently wrong"
    DEFECT = "unnamed error"  # anything but an error of the compiler's own classes


def derive_and_check(model: TokensToLogits) -> tuple[Outcome, str]:
    """Compile the model and compare the decoder with it; the reason is empty for a derived one.

    Compared are greedy tokens from prompts of different lengths in one batch, and the logits at every position of two
    rows fed in uneven chunks, one of them rolled back once and fed again.
    """
    import accelc
    from accelc.ir.errors import AccelcError, NotCausalError

    try:
        decoder = accelc.compile(model.model, max_length=MAX_LENGTH, backend="eager", cache=False)
        difference = _greedy_difference(model, decoder) or _logits_difference(model, decoder)
    except NotCausalError as error:
        return Outcome.NOT_CAUSAL, _describe(error)
    except AccelcError as error:
        return Outcome.REFUSED, _describe(error)
    except Exception as error:  # noqa: BLE001  (the row says that the compiler let an unnamed error escape)
        return Outcome.DEFECT, _describe(error)
    return (Outcome.WRONG, difference) if difference else (Outcome.DERIVED, "")


def _describe(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "remedy:" not in line]
    return f"{type(error).__name__}: {' '.join(' '.join(lines).split())}"[:240]


@torch.no_grad()
def _greedy_difference(model: TokensToLogits, decoder) -> str:
    """The first greedy token that differs and is no tie, or nothing. Each row is checked alone, without padding."""
    prompts = [text(1, length, seed=length)[0] for length in PROMPTS]
    sequences = decoder.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True).sequences
    for prompt, sequence in zip(prompts, sequences):
        if len(sequence) != len(prompt) + NEW_TOKENS:
            return f"{len(sequence)} tokens instead of {len(prompt) + NEW_TOKENS}"
        logits = model(sequence[None, :-1])[0, len(prompt) - 1 :]  # what each generated token was chosen from
        best = logits.amax(-1)
        chosen = logits.gather(-1, sequence[len(prompt) :, None])[:, 0]
        lost = (best - chosen) / _spread(logits)
        if lost.max() > TIE:
            at = int((lost > TIE).nonzero()[0])
            return f"greedy token {at} after a prompt of {len(prompt)} loses {lost[at]:.1e} of the logits' spread"
    return ""


@torch.no_grad()
def _logits_difference(model: TokensToLogits, decoder) -> str:
    """The largest difference of logits over all positions when it exceeds the tolerance, or nothing."""
    ids = text(2, 1 + sum(CHUNKS), seed=7)
    expected = model(ids)
    spread = _spread(expected)
    with decoder.start([row[:1] for row in ids]) as session:
        begin = 1
        for count in CHUNKS:
            chunk = ids[:, begin : begin + count]
            wrong = chunk.clone()
            wrong[1] = wrong[1].roll(1) if count > 1 else (wrong[1] + 1) % expected.shape[-1]
            session.step(wrong)
            session.rollback([0, 1], [begin, begin])
            error = (session.step(chunk) - expected[:, begin : begin + count]).abs().max() / spread
            if not error <= TOLERANCE:  # also catches NaN
                return f"logits of positions {begin} to {begin + count - 1} differ by {error:.1e} of their spread"
            begin += count
    return ""


def _spread(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)).abs().max()
