"""Models made of torch's own attention layers decode as their forward says, however the causal mask is spelled."""

from collections.abc import Callable

import pytest
import torch
from greedy import reference
from torch import Tensor, nn

import accelc
from accelc.capture import capture
from accelc.ir.errors import AccelcError

VOCABULARY, WIDTH, HEADS, LENGTH = 31, 16, 4, 32
PROMPT = torch.tensor([3, 4, 5])


def hidden(length: int) -> Tensor:
    """True where a token may not look."""
    return torch.triu(torch.ones(length, length, dtype=torch.bool), 1)


def minus_infinity(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


class Model(nn.Module):
    """Token and learned position embeddings, a layer, a head."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layer, self.head, self.call = layer, nn.Linear(WIDTH, VOCABULARY), call

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(x + self.call(self.layer, x))


def attention(**options: object) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})  # type: ignore[arg-type]


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **{"batch_first": True, **options})  # type: ignore[arg-type]
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def nobody(x: Tensor) -> Tensor:
    """A padding mask [B, T] that hides no token."""
    return torch.zeros(x.shape[:2], dtype=torch.bool)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "attention, bool mask": (attention, lambda m, x: m(x, x, x, attn_mask=hidden(x.shape[1]), need_weights=False)[0]),
    "attention, float mask": (
        attention,
        lambda m, x: m(x, x, x, attn_mask=minus_infinity(x.shape[1]), need_weights=False)[0],
    ),
    "attention, weights returned": (attention, lambda m, x: m(x, x, x, attn_mask=hidden(x.shape[1]))[0]),
    "attention, is_causal": (
        attention,
        lambda m, x: m(x, x, x, attn_mask=hidden(x.shape[1]), is_causal=True, need_weights=False)[0],
    ),
    "attention, padding mask": (
        attention,
        lambda m, x: m(x, x, x, attn_mask=hidden(x.shape[1]), key_padding_mask=nobody(x), need_weights=False)[0],
    ),
    "attention, time first": (
        lambda: attention(batch_first=False),
        lambda m, x: m(*[x.transpose(0, 1)] * 3, attn_mask=hidden(x.shape[1]), need_weights=False)[0].transpose(0, 1),
    ),
    "attention, width of values twice the head": (
        lambda: attention(kdim=WIDTH, vdim=WIDTH // 2),
        lambda m, x: m(x, x, x[..., : WIDTH // 2], attn_mask=hidden(x.shape[1]), need_weights=False)[0],
    ),
    "encoder, bool mask": (encoder, lambda m, x: m(x, mask=hidden(x.shape[1]))),
    "encoder, float mask": (encoder, lambda m, x: m(x, mask=minus_infinity(x.shape[1]))),
    "encoder, is_causal": (encoder, lambda m, x: m(x, mask=minus_infinity(x.shape[1]), is_causal=True)),
    "encoder, padding mask": (
        encoder,
        lambda m, x: m(x, mask=hidden(x.shape[1]), src_key_padding_mask=nobody(x)),
    ),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), lambda m, x: m(x, hidden(x.shape[1]))),
}


def settled(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics of its own."""
    torch.nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return norm


def merged(x: Tensor) -> Tensor:
    return x.reshape(-1, WIDTH)


CASES |= {
    "batch norm over channels": (
        lambda: settled(nn.BatchNorm1d(WIDTH)),
        lambda m, x: m(x.transpose(1, 2)).transpose(1, 2),
    ),
    "batch norm of merged rows": (lambda: settled(nn.BatchNorm1d(WIDTH)), lambda m, x: m(merged(x)).view_as(x)),
    "group norm of merged rows": (lambda: nn.GroupNorm(4, WIDTH), lambda m, x: m(merged(x)).view_as(x)),
}
REFUSED: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], str]] = {
    "group norm over the sequence": (
        nn.GroupNorm(4, WIDTH),
        lambda m, x: m(x.transpose(1, 2)).transpose(1, 2),
        "normalises over the sequence",
    ),
    "batch norm without statistics": (
        nn.BatchNorm1d(WIDTH, track_running_stats=False),
        lambda m, x: m(merged(x)).view_as(x),
        "statistics of the batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_mix_tokens_are_refused_by_name(name: str) -> None:
    layer, call, text = REFUSED[name]
    with pytest.raises(AccelcError, match=text):
        accelc.compile(Model(layer, call).eval(), max_length=LENGTH, cache=False, backend="eager")


@pytest.mark.parametrize("name", CASES)
def test_generate_is_what_the_model_says(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    layer, call = CASES[name]
    model = Model(layer(), call).eval()
    decoder = accelc.compile(model, max_length=LENGTH, cache=False, backend="eager")
    assert decoder.generate(PROMPT, max_new_tokens=12).tokens[0].tolist() == reference(model, PROMPT, 12)
    assert capfd.readouterr().err == ""


def test_the_encoders_own_question_about_its_mask_is_asked_again_afterwards() -> None:
    from torch.nn.modules import transformer

    before = transformer._detect_is_causal_mask
    capture(Model(encoder(), CASES["encoder, bool mask"][1]).eval(), max_length=LENGTH)
    assert transformer._detect_is_causal_mask is before
    assert before(minus_infinity(5)) is True
