"""Models on a CUDA device through the front doors: decoding, sampling, few bits, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, Expect, names
from torch import nn

import accelc
from accelc.runtime import graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NEW_TOKENS = 48
PROMPTS = (13, 5, 29)


def prompts(vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in PROMPTS]


def worst_choice(model: nn.Module, prompt: torch.Tensor, tokens: torch.Tensor) -> float:
    """How far the logit of a token lies below that of the model's own choice (on the GPU), at most; logits spread by
    some 2.6 here.
    """
    ids = torch.cat([prompt, tokens]).cuda()
    with torch.no_grad():
        out = model(ids[None])
    logits = (out if isinstance(out, torch.Tensor) else out.logits)[0, len(prompt) - 1 : -1].float()
    return float((logits.amax(-1) - logits.gather(1, tokens.cuda()[:, None])[:, 0]).max())


@pytest.mark.parametrize("name", names(Expect.DERIVED))
def test_greedy_tokens_are_the_choices_of_the_model(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().cuda()
    given = prompts(family.vocabulary)
    decoder = accelc.compile(model, max_length=max(PROMPTS) + NEW_TOKENS, cache=False)
    result = decoder.generate(given, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for prompt, tokens in zip(given, result.tokens, strict=True):
        assert len(tokens) == NEW_TOKENS
        assert worst_choice(model, prompt, tokens.cpu()) <= 1e-3


def test_prompts_may_lie_on_the_gpu_and_samples_repeat() -> None:
    decoder = accelc.compile(FAMILIES["llama"].build().cuda(), max_length=64, cache=False)
    prompt = prompts(97)[0].cuda()
    params = accelc.SamplingParams(temperature=0.8, top_p=0.9)

    def sample(seed: int) -> list[int]:
        result = decoder.generate(prompt, max_new_tokens=16, sampling=params, seed=seed, ignore_eos=True)
        return result.tokens[0].tolist()

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_bf16_decodes() -> None:
    model = FAMILIES["llama"].build().cuda().bfloat16()
    decoder = accelc.compile(model, max_length=64, cache=False)
    prompt = prompts(97)[0]
    tokens = decoder.generate(prompt, max_new_tokens=24, ignore_eos=True).tokens[0].cpu()
    assert worst_choice(model, prompt, tokens) <= 0.3  # bf16 rounds logits of 8 to 1/32


@pytest.mark.parametrize("scheme", ["int8", "int4:g32", "int4:g64:asym"])
def test_a_quantized_decoder_runs_the_kernel(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelc.codegen.gpu import quantized_gemm as module
    from accelc.ir.quantized import Scheme
    from accelc.ir.rounding import round_to_nearest

    calls: list[tuple[int, ...]] = []
    run = module.quantized_gemm

    def counted(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return run(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "quantized_gemm", counted)
    model = FAMILIES["llama"].build().cuda().bfloat16()
    decoder = accelc.compile(model, max_length=64, quantize=scheme, cache=False)
    ids = torch.cat(prompts(97)).cuda()
    rounded = FAMILIES["llama"].build().cuda().bfloat16()
    with torch.no_grad():
        for name, layer in rounded.named_modules():
            if isinstance(layer, nn.Linear):
                text = "int8" if name == "lm_head" else scheme
                layer.weight.copy_(round_to_nearest(layer.weight.clone(), Scheme.parse(text)).dequantize())
        halves = rounded(ids[None]).logits[0]
        exact = rounded.float()(ids[None]).logits[0]
    with decoder.start(ids[None, :1]) as session:
        calls.clear()
        logits = session.step(ids[None, 1:])[0]

    def error(given: torch.Tensor) -> float:
        return float((given.float() - exact[1:]).square().mean().sqrt())

    # No worse than torch's own bf16, whose weights are rounded to it once more.
    assert error(logits) <= 1.2 * error(halves[1:])
    assert calls, "the Triton kernel was not called"


def test_the_step_of_one_token_is_a_graph_that_sessions_share(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    make = graphs.cuda_graph
    monkeypatch.setattr(graphs, "cuda_graph", lambda call, pool: captured.append(call) or make(call, pool))
    decoder = accelc.compile(FAMILIES["llama"].build().cuda(), max_length=64, cache=False)
    given = prompts(97)
    for batch in (3, 1, 3, 1):  # the larger one first: smaller ones then use its rows
        for params in (accelc.SamplingParams(), accelc.SamplingParams(temperature=0.8, top_k=20)):
            result = decoder.generate(given[:batch], max_new_tokens=20, sampling=params, seed=1, ignore_eos=True)
            with decoder.start(given[:batch]) as session, torch.inference_mode():  # one launch after another
                for place in range(20):
                    expected = [tokens[place] for tokens in result.tokens]
                    if params.greedy:
                        assert session.logits.argmax(-1).tolist() == expected
                    session.step(torch.stack(expected))
    assert len(captured) == 2
    assert not decoder._pool.graphs.notice


def test_a_step_that_reads_values_is_not_captured_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    decoder = accelc.compile(FAMILIES["llama"].build().cuda(), max_length=64, cache=False)
    step = decoder.steps.decode

    def reading(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        int(inputs[0].sum())
        return step(*inputs)

    expected = decoder.generate(prompts(97), max_new_tokens=12, ignore_eos=True)
    other = accelc.compile(FAMILIES["llama"].build().cuda(), max_length=64, cache=False)
    object.__setattr__(other.steps, "decode", reading)
    for _ in range(2):
        result = other.generate(prompts(97), max_new_tokens=12, ignore_eos=True)
        assert [row.tolist() for row in result.tokens] == [row.tolist() for row in expected.tokens]
    assert "not captured as a graph" in other._pool.graphs.notice
    assert torch.rand(3, device="cuda").isfinite().all(), "random numbers still work"
    assert len([record for record in caplog.records if "not captured" in record.message]) == 1


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 256), nn.Linear(128, 64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(a) * b)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"quantize": "int4:g32"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_compile(options: dict[str, object], dtype: torch.dtype) -> None:
    model = Gated().cuda().to(dtype)
    x = torch.randn(3, 5, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        want = model(x)
        got = torch.compile(model, backend="accelc", fullgraph=True, options=options)(x)
    tolerance = 0.15 if "quantize" in options else (1e-4 if dtype is torch.float32 else 0.05)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("fresh_compiler")
def test_training_is_left_alone() -> None:
    model = Gated().cuda()
    x = torch.randn(2, 64, device="cuda")
    torch.compile(model, backend="accelc")(x).sum().backward()
    got = model.up.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, model.up.weight.grad, rtol=1e-4, atol=1e-4)
