"""What the compiler makes of one model, judged by a comparison of its own with the original forward."""

from __future__ import annotations

import enum
import re
from typing import Any

import torch
from family_causality import with_special_tokens
from family_models import TokensToLogits, text
from torch import Tensor, nn

MAX_LENGTH = 96
NEW_TOKENS = 16
PROMPTS = (5, 13)  # lengths: on either side of the windows
CHUNKS = (1, 3, 1, 8, 2, 5, 1)  # tokens per step in the comparison at every position
TOLERANCE = 1e-3  # of the logits' spread
TIE = 1e-3  # two logits closer than this share of the spread may swap
_FOLDER = re.compile(r"/\S*/site-packages/")  # where the libraries lie does not matter


class Outcome(enum.Enum):
    """How a compilation ended."""

    DERIVED = "derived"
    REFUSED = "refused"
    NOT_CAUSAL = "not causal"
    WRONG = "silently wrong"
    DEFECT = "unnamed error"  # anything but an error of the compiler's own classes


def derive_and_check(model: TokensToLogits) -> tuple[Outcome, str, list[Tensor]]:
    """Compile the model and compare the decoder with it: outcome, reason (empty for a derived one), greedy sequences.

    Compared with the model's plain forward are greedy tokens from prompts of different lengths in one batch, and the
    logits at every position of two rows fed in uneven chunks, one of them rolled back once and fed again; with
    ordinary tokens, then with special ones among them.
    """
    import accelc
    from accelc.ir.errors import AccelcError, NotCausalError

    sequences: list[Tensor] = []
    try:
        decoder = accelc.compile(model.model, max_length=MAX_LENGTH, backend="eager", cache=False)
        prompts = [text(1, length, seed=length)[0] for length in PROMPTS]
        sequences = list(decoder.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True).sequences)
        ids = text(2, 1 + sum(CHUNKS), seed=7)
        difference = (
            greedy_difference(model, prompts, sequences)
            or logits_difference(model, decoder, ids)
            or logits_difference(model, decoder, with_special_tokens(ids))
        )
    except NotCausalError as error:
        return Outcome.NOT_CAUSAL, _describe(error), []
    except AccelcError as error:
        return Outcome.REFUSED, _describe(error), []
    except Exception as error:  # noqa: BLE001  (the row says that the compiler let an unnamed error escape)
        return Outcome.DEFECT, _describe(error), []
    return (Outcome.WRONG, difference, []) if difference else (Outcome.DERIVED, "", sequences)


def _describe(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "remedy:" not in line]
    message = _FOLDER.sub("", " ".join(" ".join(lines).split()))
    return f"{type(error).__name__}: {message}"[:240]


@torch.no_grad()
def greedy_difference(model: nn.Module, prompts: list[Tensor], sequences: list[Tensor]) -> str:
    """The first token that is not the plain forward's greedy choice, and no tie with it, or nothing.

    Each row [T] is run alone, without padding, so what the batch did to it shows. The forward sees the tokens that
    were generated: equal to letting it generate by itself, except that a tie does not end the comparison.
    """
    for prompt, sequence in zip(prompts, sequences, strict=True):
        if not torch.equal(sequence[: len(prompt)], prompt):
            return "the sequence does not begin with its prompt"
        if len(sequence) != len(prompt) + NEW_TOKENS:
            return f"{len(sequence)} tokens instead of {len(prompt) + NEW_TOKENS}"
        logits = model(sequence[None, :-1])[0, len(prompt) - 1 :]  # what each generated token was chosen from
        best = logits.amax(-1)
        chosen = logits.gather(-1, sequence[len(prompt) :, None])[:, 0]
        lost = (best - chosen) / _spread(logits)
        if not lost.max() <= TIE:  # also catches NaN
            at = int((~(lost <= TIE)).nonzero()[0])
            return f"greedy token {at} after a prompt of {len(prompt)} loses {lost[at]:.1e} of the logits' spread"
    return ""


@torch.no_grad()
def logits_difference(model: nn.Module, decoder: Any, ids: Tensor) -> str:
    """The largest difference of logits over all positions of ids [2, T] when it exceeds the tolerance, or nothing."""
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


@torch.no_grad()
def library_agrees(model: TokensToLogits, sequences: list[Tensor]) -> bool | None:
    """Whether transformers' own greedy `generate`, with its cache, gives the same sequences; None where it fails.

    Where it differs, the forward decides (`greedy_difference`); the page names the types.
    """
    from transformers import GenerationConfig

    language_model: Any = model.model
    # Set on the model: `generate` fills what an argument leaves open, such as the end token, from the model's settings.
    language_model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    try:
        own = [
            language_model.generate(input_ids=sequence[None, :length])[0]
            for sequence, length in zip(sequences, PROMPTS, strict=True)
        ]
    except Exception:  # noqa: BLE001  (classes without generation, or whose own generation needs other inputs)
        return None
    return all(torch.equal(a, b) for a, b in zip(own, sequences, strict=True))


def _spread(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)).abs().max()
