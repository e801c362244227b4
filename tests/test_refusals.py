"""What cannot be decoded is refused with what was observed and what its author can do about it."""

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

import accelc
from accelc.ir import errors
from accelc.ir.errors import (
    AccelcError,
    CaptureError,
    CheckError,
    DeriveError,
    InputError,
    NoLogitsError,
    NonFiniteLogitsError,
    NotCausalError,
)
from accelc.passes.recognise_masks import RecogniseMasks, probe_positions


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


class RanksAcrossRows(Model):
    """As routers with a capacity do: seen in the numbers only once 50 tokens are there."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.token(ids))
        rank = (x[..., 0] > 0).reshape(-1).long().cumsum(0).view(ids.shape)
        return self.head(x + (rank <= 50)[..., None] * x)


class ByPlaceInTheBatch(Model):
    def forward(self, ids: Tensor) -> Tensor:
        late = (torch.arange(ids.shape[0]) >= 20).float()
        return self.head(self.mix(self.token(ids))) * (1 - 2 * late)[:, None, None]


class HoleInTheMask(Model):
    """Two positions, far from the beginning, see each other."""

    def __init__(self, at: int = 28, length: int = 32) -> None:
        super().__init__()
        mask = torch.ones(length, length).tril().bool()
        mask[at : at + 2, at : at + 2] = True
        self.register_buffer("mask", mask)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.token(ids), ids.shape[1]
        return self.head(F.scaled_dot_product_attention(x, x, x, self.mask[:length, :length]))


class OverAllTokens(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(self.mix(x) + x.mean(1, keepdim=True))


class WithItem(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(self.mix(x) * self.head.bias[0].item())


class LengthAsNumber(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.token(ids))) * (ids.shape[1] / 2)


class Integers(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.token(ids))).long()


@pytest.mark.parametrize(
    ("model", "error", "observed", "advice"),
    [
        (FromTheEnd, NotCausalError, "when the sequence ends after", "positions counted from the end"),
        (NoMask, NotCausalError, "when tokens from position", "attention without a causal mask"),
        (Random, CaptureError, "for the same ids", "random numbers"),
        (NoNumber, NonFiniteLogitsError, "NaN", "Check the weights"),
        (OverTheBatch, CheckError, "of the logits' spread", "statistics over the batch"),
        (RanksAcrossRows, DeriveError, "accumulates along the rows of the batch", "a running sum"),
        (ByPlaceInTheBatch, DeriveError, "the number of a row", "pick values"),
        (HoleInTheMask, NotCausalError, "lets position 28 see position 29", "attention without a causal mask"),
        (OverAllTokens, DeriveError, "reduces over the sequence", "a running sum"),
        (WithItem, DeriveError, "read from a tensor", "leave out .item()"),
        (LengthAsNumber, DeriveError, "sequence length as a number", "a running sum"),
        (Integers, NoLogitsError, "int64", "float32"),
    ],
)
def test_the_refusal_says_what_was_seen_and_what_to_do(
    model: type[Model], error: type[AccelcError], observed: str, advice: str
) -> None:
    with pytest.raises(error) as raised:
        accelc.compile(model().eval(), max_length=32, cache=False, backend="eager")
    assert observed in raised.value.what
    assert advice in raised.value.remedy


def test_a_mask_is_read_at_every_position() -> None:
    """Not only at those that a mask family is recognised by, and long behind the tokens that the check runs."""
    length = 404
    at = next(i for i in range(300, 390) if i not in probe_positions(length, RecogniseMasks.rows))
    with pytest.raises(NotCausalError, match=f"position {at} see position {at + 1}"):
        accelc.compile(HoleInTheMask(at, length).eval(), max_length=length, cache=False, backend="eager")


def test_no_remedy_is_a_report_or_a_check_that_is_switched_off() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, AccelcError)]
    assert len(classes) > 30
    for cls in classes:
        assert "report" not in cls.remedy.lower(), cls
        assert "check=" not in cls.remedy, cls


def test_an_encoder_decoder_model_is_told_apart() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(CaptureError, match="encoder-decoder"):
        accelc.compile(T5ForConditionalGeneration(config), max_length=16)


def test_autocast_is_refused_while_compiling_and_ignored_while_decoding() -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=16, backend="eager")
    before = decoder.generate([1, 2], max_new_tokens=6).tokens[0].tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(InputError, match="autocast"):
            accelc.compile(model, max_length=16)
        with decoder.start([1, 2]) as session:
            assert session.logits.dtype == torch.float32
        assert decoder.generate([1, 2], max_new_tokens=6).tokens[0].tolist() == before


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_weight_that_is_no_number_is_named(quantize: str | None) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(AccelcError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        accelc.compile(model, max_length=32, quantize=quantize, cache=False)
