"""A decoder of a model whose weights changed: what is written in place counts, what cannot count is an error."""

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES
from greedy import reference
from torch import nn

import accelc
from accelc.ir.errors import StaleDecoderError

PROMPT = torch.tensor([5, 9, 11, 4])


class Folds(nn.Module):
    """A bigram model with a scale that is a function of a parameter, and its table read through a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(13, 8))
        self.rate = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(ids, self.table) * self.rate.exp() + self.shift.tanh()
        return x @ self.table.t()


def tokens(decoder: accelc.CompiledDecoder) -> list[int]:
    return decoder.generate(PROMPT, max_new_tokens=12, ignore_eos=True).tokens[0].tolist()


@pytest.mark.parametrize("cache", [False, True])
def test_writes_in_place_count(cache: bool) -> None:
    for model in (FAMILIES["llama"].build(), Folds()):
        for _ in range(2 if cache else 1):
            decoder = accelc.compile(model, max_length=32, cache=cache)
        before = tokens(decoder)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn_like(parameter))
        assert tokens(decoder) == reference(model, PROMPT, 12) != before


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "another parameter": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach() * -1)),
    "data": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data * -1),
    "dtype": lambda m: m.to(torch.float64),
    "assigned": lambda m: m.load_state_dict({k: v * -1 for k, v in m.state_dict().items()}, assign=True),
    "deleted": lambda m: delattr(m.lm_head, "weight"),
    "another layer": lambda m: setattr(m.model.layers[0].mlp, "up_proj", nn.Linear(64, 128, bias=False)),
}


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_in_other_memory_are_an_error(change: Callable[[nn.Module], object], backend: str) -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=32, backend=backend)
    change(model)
    for call in (decoder.generate, decoder.stream, decoder.start):
        with pytest.raises(StaleDecoderError, match=r"LlamaForCausalLM changed .*weight"):
            call(PROMPT)


@pytest.mark.parametrize("cache", [False, True])
def test_a_write_that_a_table_does_not_see_is_an_error(cache: bool) -> None:
    model = Folds()
    for _ in range(2 if cache else 1):
        decoder = accelc.compile(model, max_length=32, cache=cache)
    tokens(decoder)
    with torch.no_grad():
        model.rate.add_(1.0)
    with pytest.raises(StaleDecoderError, match="rate was written to"):
        tokens(decoder)
    decoder = accelc.compile(model, max_length=32)
    assert tokens(decoder) == reference(model, PROMPT, 12)


def test_a_buffer_may_be_made_anew_with_the_same_values() -> None:
    model = Folds()
    decoder = accelc.compile(model, max_length=32)
    model.shift = model.shift.clone()
    tokens(decoder)
    model.shift = model.shift + 1
    with pytest.raises(StaleDecoderError, match="shift was replaced"):
        tokens(decoder)


def test_codes_do_not_follow_their_floats() -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=32, quantize="int8")
    tokens(decoder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # not quantized: counts
    tokens(decoder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(StaleDecoderError, match=r"up_proj\.weight was written to, and the decoder holds it"):
        tokens(decoder)


def test_unread_weights_and_a_model_that_is_gone_do_not_matter() -> None:
    model = FAMILIES["llama"].build()
    model.unused = nn.Linear(3, 3)
    decoder = accelc.compile(model, max_length=32)
    before = tokens(decoder)
    model.unused.weight.data = torch.zeros(1)
    model.train().requires_grad_(False)
    assert tokens(decoder) == before
    del model
    assert tokens(decoder) == before
