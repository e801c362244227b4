"""Weights in few bits through the front doors: accelc.compile, torch.compile, directories, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from families import FAMILIES
from torch import nn
from typer.testing import CliRunner

import accelc
from accelc.backend import GraphReport
from accelc.checkpoints import load_quantized, save_quantized
from accelc.cli import app
from accelc.ir.errors import BackendError, ExactnessError, InputError, MetaDeviceError, OptionValueError
from accelc.ir.quantized import Scheme
from accelc.ir.rounding import round_to_nearest
from accelc.passes.quantize.budget import QuantizationPlan

PROMPT = torch.tensor([5, 9, 11, 4])


def rounded(model: nn.Module, scheme: str, head: str) -> nn.Module:
    """The same model with the values that its codes stand for."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                text = head if name == "lm_head" else scheme
                module.weight.copy_(round_to_nearest(module.weight.clone(), Scheme.parse(text)).dequantize())
    return model


def is_greedy(model: nn.Module, prompt: torch.Tensor, tokens: list[int], slack: float) -> bool:
    """Whether each token is the model's choice, or its logit within `slack` of that one's."""
    ids = torch.cat([prompt, torch.tensor(tokens)])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
    return bool((logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0] <= slack).all())


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("scheme", ["int8", "int4:g32"])
def test_a_quantized_decoder_is_the_model_with_rounded_weights(family: str, scheme: str) -> None:
    decoder = accelc.compile(FAMILIES[family].build(), max_length=64, quantize=scheme, cache=False)
    got = decoder.generate(PROMPT, max_new_tokens=24, ignore_eos=True).tokens[0].tolist()
    reference = rounded(FAMILIES[family].build(), scheme, "int8")
    assert is_greedy(reference, PROMPT, got, 2e-3)
    # Otherwise the comparison above could not fail: the weights that were rounded choose other tokens.
    assert not is_greedy(FAMILIES[family].build(), PROMPT, got, 2e-3) or scheme == "int8"
    assert decoder.report.seconds["quantize"] > 0
    assert "lossy" in str(decoder)


def test_a_directory_is_quantized_while_it_is_read(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path)
    decoder = accelc.compile(tmp_path, max_length=64, quantize="int4:g32", cache=False)
    got = decoder.generate(PROMPT, max_new_tokens=24, ignore_eos=True).tokens[0].tolist()
    assert is_greedy(rounded(model, "int4:g32", "int8"), PROMPT, got, 2e-3)
    floats = [t for t in decoder.programs["step"].tensors().values() if t.dim() == 2 and t.dtype is torch.float32]
    assert sum(t.numel() for t in floats) <= 97 * 64 + 4096  # the embedding and tables


def test_stacks_of_experts_in_a_directory_are_quantized_too(tmp_path: Path) -> None:
    FAMILIES["mixtral"].build().save_pretrained(tmp_path)
    decoder = accelc.compile(tmp_path, max_length=32, quantize="int8", cache=False)
    assert decoder.programs["step"].history[-1].matches == 4
    assert len(decoder.generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens[0]) == 4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"quantize": "int3"}, InputError, "int8 or int4"),
        ({"quantize": 4}, InputError, "scheme"),
        ({"quantize": "int4", "require": accelc.Exactness.EXACT}, ExactnessError, "lossy"),
        ({"quantize": accelc.QuantizeWeights(method="gptq")}, OptionValueError, "calibration"),
        ({"quantize": accelc.QuantizeWeights(include="*nothing*")}, OptionValueError, "matches no weight"),
    ],
)
def test_what_cannot_be_done_is_named(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        accelc.compile(FAMILIES["llama"].build(), max_length=32, cache=False, **options)


def test_a_model_whose_weights_were_freed_is_named() -> None:
    model = FAMILIES["llama"].build()
    accelc.compile(model, max_length=32, quantize=accelc.QuantizeWeights(consume=True), check="off", cache=False)
    with pytest.raises(MetaDeviceError, match="have no memory any more"):
        accelc.compile(model, max_length=32, cache=False)
    assert accelc.compile(FAMILIES["gpt2"].build(), max_length=32, quantize="none", cache=False).report is not None


def test_a_quantized_model_in_double_is_refused(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the scales of a QuantizedLinear are float64"):
        accelc.compile(load_quantized(tmp_path).double(), max_length=32, cache=False)


def test_compiling_a_second_time_gives_the_same_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path))
    model = FAMILIES["llama"].build()
    runs = [accelc.compile(model, max_length=32, quantize="int4") for _ in range(2)]
    assert any("from the cache" in notice for notice in runs[1].report.notices)
    first, second = (d.generate(PROMPT, max_new_tokens=12, ignore_eos=True).tokens[0].tolist() for d in runs)
    assert first == second


def test_the_drop_in_backend_quantizes_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 40)).eval()
    reference = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 40)).eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        for module in (reference[0], reference[2]):
            module.weight.copy_(round_to_nearest(module.weight.clone(), Scheme.parse("int4:g32")).dequantize())
        fast = torch.compile(model, backend="accelc", options={"quantize": "int4:g32"})
        for rows in (1, 3, 5):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(fast(x), reference(x), atol=1e-3, rtol=1e-3)
            assert float((fast(x) - model(x)).abs().max()) > 1e-2
    torch.compiler.reset()


def test_the_drop_in_backend_knows_weights_by_their_names(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)).eval()
    reports: list[GraphReport] = []

    def compiled(**options: str) -> str:
        torch.compiler.reset()
        quantize = accelc.QuantizeWeights("int4:g32", **options)
        run = torch.compile(model, backend="accelc", options={"quantize": quantize, "report": reports.append})
        with torch.no_grad():
            run(torch.randn(2, 64))
        return str(reports[-1].history[-1].notes)

    assert "1 weights by rtn" in compiled(include="0.0.*")
    assert "1 in int8:row, 1 in int4:g32" in compiled(overrides="0.0.weight=int8")
    assert "no weight was left" in compiled(include="q_proj*")
    assert "'q_proj*' matches no weight of a graph, which has 0.0.weight, 1.weight" in caplog.text
    assert "found no product with a weight in a graph that reads 2 matrices" in caplog.text
    torch.compiler.reset()


def test_the_drop_in_backend_tells_models_apart() -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    reports: list[GraphReport] = []

    def both(x: torch.Tensor) -> torch.Tensor:
        return first(x) + second(x)  # type: ignore[no-any-return]

    torch.compiler.reset()
    quantize = accelc.QuantizeWeights("int4:g32", include="second.*")
    run = torch.compile(both, backend="accelc", options={"quantize": quantize, "report": reports.append})
    x = torch.randn(2, 64)
    with torch.no_grad():
        run(x)
        assert reports[-1].history[-1].matches == 1
        second.weight.data = second.weight.data + 1
        with pytest.raises(BackendError, match="is not the one this graph was compiled with"):
            run(x)
    torch.compiler.reset()


def test_activations_of_8_bits_that_change_nothing_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelc.compiler.has_byte_products", lambda: False)
    for scheme, backend, announced in (("int8", "native", True), ("int4", "native", False), ("int4", "eager", True)):
        quantize = accelc.QuantizeWeights(scheme, activation_bits=8)
        decoder = accelc.compile(FAMILIES["llama"].build(), max_length=32, quantize=quantize, backend=backend,
                                 check="off", cache=False)  # fmt: skip
        assert any("activation_bits=8 changes nothing" in notice for notice in decoder.report.notices) is announced


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of letters, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    vocabulary = {f"<{i}>": i for i in range(97 - 26)} | {chr(97 + i): 71 + i for i in range(26)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    FAMILIES["llama"].build().save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<0>").save_pretrained(path)
    (path / "text.txt").write_text("thequickbrownfoxjumpsoverthelazydog" * 3)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_eval_states_the_loss_on_the_command_line(directory: Path) -> None:
    losses = {}
    for scheme in (None, "int8", "int4"):
        options = [] if scheme is None else ["--quantize", scheme]
        shape = ["--window", 32, "--max-length", 64]
        result = run("eval", directory, directory / "text.txt", "--json", *shape, *options)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout.strip().splitlines()[-1])
        assert found["tokens"] == 104
        assert found["quantize"] == scheme
        losses[scheme] = found["loss"]
    assert losses["int8"] == pytest.approx(losses[None], rel=1e-2)
    assert abs(losses["int8"] - losses[None]) < abs(losses["int4"] - losses[None])
    assert run("eval", directory, directory / "none.txt").exit_code == 1


def test_a_plan_is_made_on_the_command_line(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    shape = ["--rows", 2, "--length", 32]
    result = run("plan-quantize", directory, directory / "text.txt", "--max-bytes", 70_000, "--out", out, *shape)
    assert result.exit_code == 0, result.output
    plan = QuantizationPlan.load(out)
    assert plan.size <= 70_000
    assert out.with_suffix(".svg").stat().st_size > 1000
    decoder = accelc.compile(FAMILIES["llama"].build(), max_length=32, quantize=plan.to_pass(), cache=False)
    assert len(decoder.generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens[0]) == 4
    both = run("plan-quantize", directory, directory / "text.txt", "--max-bytes", 1e5, "--max-rise", 0.1, "--out", out)
    assert both.exit_code == 1
    assert "--max-rise" in both.output
    assert "--max-bytes" in run("plan-quantize", tmp_path / "nowhere", directory / "text.txt").output
    assert "--max-rise is nan" in run("plan-quantize", directory, directory / "text.txt", "--max-rise", "nan").output
    save_quantized(load_quantized(directory), tmp_path / "own")
    same = run("plan-quantize", directory, directory / "text.txt", "--max-bytes", 1e5, "--out", tmp_path / "x.svg")
    assert "where the plot goes" in same.output
    own = run("plan-quantize", tmp_path / "own", directory / "text.txt", "--max-bytes", 1e5, "--out", out)
    assert own.exit_code == 1
    assert "quantized already" in own.output
