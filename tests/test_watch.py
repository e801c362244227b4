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
        with pytest.raises(StaleDecoderError, match=r"LlamaForCausalLM changed .*(weight|up_proj)"):
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
    before = tokens(decoder)
    model.shift = model.shift.clone()
    assert tokens(decoder) == before
    model.load_state_dict(model.state_dict())  # writes every folded parameter, with the values it has
    assert tokens(decoder) == before
    model.shift = model.shift + 1
    with pytest.raises(StaleDecoderError, match="shift was replaced"):
        tokens(decoder)


class Stack(nn.Module):
    """Layers in a list, a plain tensor, one in a list, a number, and a cache of its own that grows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.shift, self.rates, self.power = torch.randn(8), [torch.randn(8)], 0.5
        self.calls = 0
        self.ramp = torch.zeros(0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.rates[0]
        for layer in self.layers:
            x = x + layer(x).tanh() * self.power
        return self.head(x + self.shift)

    def keep(self, length: int) -> None:
        self.calls += 1
        self.ramp = torch.arange(length)


PARTS: dict[str, Callable[[Stack], object]] = {
    "another layer": lambda m: m.layers.append(nn.Linear(8, 8)),
    "a layer less": lambda m: m.layers.pop(-1),
    "a layer twice": lambda m: m.layers.append(m.layers[0]),
    "a hook": lambda m: m.head.register_forward_hook(lambda module, args, out: -out),
    "a hook before": lambda m: m.head.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "a forward of its own": lambda m: setattr(m.head, "forward", lambda x: -x @ m.head.weight.T),
    "a plain tensor": lambda m: setattr(m, "shift", torch.randn(8) * 5),
    "a tensor in a list": lambda m: m.rates.__setitem__(0, torch.randn(8)),
    "a number": lambda m: setattr(m, "power", -3.0),
}


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_other_parts_that_compute_something_else_are_an_error(change: Callable[[Stack], object]) -> None:
    model = Stack()
    decoder = accelc.compile(model, max_length=32)
    before = tokens(decoder)
    model.keep(7)
    model.gradient_checkpointing = True
    model.head.register_forward_hook(lambda module, args, out: None)
    model.train()
    assert tokens(decoder) == before, "nothing has changed what the model computes"
    assert model.training
    change(model)
    with pytest.raises(StaleDecoderError, match=r"Stack changed after it was compiled"):
        tokens(decoder)


def test_parts_of_a_quantized_decoder() -> None:
    model = Stack()
    decoder = accelc.compile(model, max_length=32, quantize="int8")
    model.keep(7)
    tokens(decoder)
    model.layers.append(nn.Linear(8, 8))
    with pytest.raises(StaleDecoderError, match="layers has other parts"):
        tokens(decoder)


def test_sessions_say_so_too() -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=32)
    session = decoder.start([PROMPT])
    model.lm_head.weight.data = model.lm_head.weight.data * -1
    for call in (lambda: session.step(torch.tensor([4])), lambda: session.extend([[4, 5]])):
        with pytest.raises(StaleDecoderError, match=r"lm_head\.weight"):
            call()


def test_a_comparison_leaves_no_inference_tensors() -> None:
    class Remembers(Folds):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(ids)
            if not torch.compiler.is_exporting():
                self.last = logits
            return logits

    model = Remembers()
    decoder = accelc.compile(model, max_length=32)
    model(PROMPT[None])
    with decoder.start([PROMPT]) as session:
        session.step(torch.tensor([4]))
    assert not model.last.is_inference()


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
