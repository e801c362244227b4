"""Perplexity by a sliding window, against the module's own logits on each window."""

import math

import pytest
import torch
from families import FAMILIES
from torch.nn import functional as F

import accelc
from accelc.evaluate import Perplexity, perplexity
from accelc.ir.errors import InputError

LENGTH = 48


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def decoder(model: torch.nn.Module) -> accelc.CompiledDecoder:
    return accelc.compile(model, max_length=LENGTH, chunk=7, cache=False)


def text(length: int) -> torch.Tensor:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("length", "window", "stride"), [(130, 48, 16), (131, 30, 29), (20, 48, 24), (2, 2, 1)])
def test_every_token_is_scored_once_with_the_context_that_is_promised(model, decoder, length, window, stride) -> None:
    ids = text(length)
    losses = {}
    with torch.no_grad():
        for begin in range(0, length, stride):
            piece = ids[begin : begin + window]
            each = F.cross_entropy(model(piece[None]).logits[0, :-1], piece[1:], reduction="none")
            for i, loss in enumerate(each.tolist()):
                losses.setdefault(begin + 1 + i, (loss, i + 1))
    assert sorted(losses) == list(range(1, length))
    assert all(context >= window - stride for at, (_, context) in losses.items() if at >= window)
    seen: list[tuple[int, int]] = []
    result = perplexity(decoder, ids, window=window, stride=stride, progress=lambda *done: seen.append(done))
    expected = sum(loss for loss, _ in losses.values()) / len(losses)
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(expected, rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-3)
    assert seen[-1] == (result.windows, result.windows)


@pytest.mark.parametrize(
    ("length", "options", "match"),
    [
        (1, {}, "nothing to predict"),
        (20, {"window": LENGTH + 1}, "window"),
        (20, {"window": 8, "stride": 8}, "stride"),
        (20, {"window": 8, "stride": 0}, "stride"),
    ],
)
def test_what_cannot_be_measured_is_named(decoder, length: int, options: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        perplexity(decoder, text(length), **options)


@pytest.mark.parametrize(
    ("ids", "options", "match"),
    [
        ([1.5, 2.5], {}, r"the text is float32 \[2\]"),
        ([True, False], {}, r"the text is bool \[2\]"),
        (torch.ones(3, 9, dtype=torch.int64), {}, r"the text is int64 \[3, 9\]"),
        ("some text", {}, "a text, not token ids"),
        ([[1, 2], [3]], {}, "which makes no token ids"),
        ([2**70, 1], {}, "which makes no token ids"),
        ([1, 2, 3], {"window": 8.0}, "window is 8.0"),
        ([1, 2, 3], {"stride": "1"}, "stride is '1'"),
        ([1, 2, 3], {"decoder": None}, "the decoder is a NoneType"),
    ],
)
def test_what_is_no_text_is_named(decoder: accelc.CompiledDecoder, ids: object, options: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        perplexity(**{"decoder": decoder, "ids": ids, **options})


def test_a_loss_beyond_numbers_is_infinite() -> None:
    assert Perplexity(800.0, 1, 1, 2, 1).perplexity == float("inf")
    assert "perplexity inf (800.00000 nats" in str(Perplexity(800.0, 1, 1, 2, 1))
