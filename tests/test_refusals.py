"""What cannot be decoded is refused with what was observed and what its author can do about it."""

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

import accelc
from accelc.ir import errors
from accelc.ir.errors import AccelcError, CaptureError, CheckError, DeriveError, NonFiniteLogitsError, NotCausalError


class Model(nn.Module):
    """One attention layer over embeddings with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(31, 16), nn.Embedding(64, 16), nn.Linear(16, 31)

    def mix(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class FromTheEnd(Model):
    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return self.head(self.mix(self.token(ids) + self.position(length - 1 - torch.arange(length))))


class NoMask(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(F.scaled_dot_product_attention(x, x, x))


class Random(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.dropout(self.mix(self.token(ids)), 0.5, training=True))


class NoNumber(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.token(ids))) * float("nan")


class OverTheBatch(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(self.mix(x - x.mean(0, keepdim=True)))


class OverAllTokens(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(self.mix(x) + x.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("model", "error", "observed", "advice"),
    [
        (FromTheEnd, NotCausalError, "when the sequence ends after", "positions counted from the end"),
        (NoMask, NotCausalError, "when tokens from position", "attention without a causal mask"),
        (Random, CaptureError, "for the same ids", "random numbers"),
        (NoNumber, NonFiniteLogitsError, "NaN", "Check the weights"),
        (OverTheBatch, CheckError, "of the logits' spread", "statistics over the batch"),
        (OverAllTokens, DeriveError, "reduces over the sequence", "a running sum"),
    ],
)
def test_the_refusal_says_what_was_seen_and_what_to_do(
    model: type[Model], error: type[AccelcError], observed: str, advice: str
) -> None:
    with pytest.raises(error) as raised:
        accelc.compile(model().eval(), max_length=32, cache=False, backend="eager")
    assert observed in raised.value.what
    assert advice in raised.value.remedy


def test_no_remedy_is_a_report_or_a_check_that_is_switched_off() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, AccelcError)]
    assert len(classes) > 30
    for cls in classes:
        assert "report" not in cls.remedy.lower(), cls
        assert "check=" not in cls.remedy, cls


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_weight_that_is_no_number_is_named(quantize: str | None) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(AccelcError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        accelc.compile(model, max_length=32, quantize=quantize, cache=False)
