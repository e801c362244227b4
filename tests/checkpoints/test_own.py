"""Quantizing while loading, and accelc's own directories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Expect, names
from models import library
from safetensors.torch import load_file

from accelc.capture import load_model
from accelc.checkpoints import load_checkpoint, load_quantized, save_quantized
from accelc.ir.errors import CheckpointError, InputError, OptionValueError
from accelc.ir.quantized import Scheme
from accelc.ir.rounding import round_to_nearest
from accelc.passes.quantize.half_quadratic import half_quadratic
from accelc.quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedModule

from . import packers
from .packers import random_matrix


@pytest.fixture
def llama(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "float")
    return model, tmp_path / "float"


def test_each_linear_gets_the_codes_of_its_weight(llama: tuple[torch.nn.Module, Path]) -> None:
    reference, path = llama
    model = load_quantized(path, "int4:g32:asym", head="int8", method="hqq")
    weights = dict(reference.named_parameters())
    linears = [name for name, m in reference.named_modules() if isinstance(m, torch.nn.Linear)]
    assert [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)] == linears
    for name in linears:
        scheme = Scheme.parse("int8" if name == "lm_head" else "int4:g32:asym")
        expected = half_quadratic(weights[f"{name}.weight"].detach(), scheme)
        value = model.get_submodule(name).weight_value()
        assert value.scheme == scheme
        assert torch.equal(value.dequantize(), expected.dequantize())
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)


def test_options_choose(llama: tuple[torch.nn.Module, Path]) -> None:
    _, path = llama
    model = load_quantized(path, head="none", include="*mlp*, *q_proj*", exclude="*down*", dtype=torch.bfloat16)
    made = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert made == {"q_proj", "gate_proj", "up_proj"}
    assert model.lm_head.weight.dtype is torch.bfloat16
    head = load_quantized(path, "none", head="int4:g32")
    assert [name for name, m in head.named_modules() if isinstance(m, QuantizedLinear)] == ["lm_head"]
    assert str(load_quantized(path, "int8:g32").lm_head.scheme) == "int8:g32"
    assert str(load_quantized(path, "int4:g32").lm_head.scheme) == "int8:row"
    for options, error, text in (
        ({"include": "*no_such*"}, OptionValueError, "matches no weight"),
        ({"scheme": "int5"}, InputError, "int4"),
        ({"scheme": "int4:auto"}, OptionValueError, r"accelc\.compile"),
        ({"method": "magic"}, OptionValueError, "hqq"),
        ({"method": "awq"}, OptionValueError, r"accelc\.compile"),
        ({"exclude": "*"}, OptionValueError, "no weight is left"),
        ({"scheme": "none"}, OptionValueError, "no weight is left"),
        ({"scheme": None}, OptionValueError, "scheme is None, not a text"),
        ({"include": ["*"]}, OptionValueError, "include is"),
        ({"method": ["rtn"]}, OptionValueError, "no method"),
        ({"source": 3}, InputError, "source is 3"),
    ):
        with pytest.raises(error, match=text):
            load_quantized(**{"source": path, **options})


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        load_quantized(tmp_path)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) and value.dtype == second[name].dtype for name, value in first.items()
    )


@pytest.mark.parametrize("family", [n for n in names(Expect.DERIVED) if n in library.LIBRARY])
def test_saving_and_loading_keeps_every_byte(family: str, tmp_path: Path) -> None:
    reference = FAMILIES[family].build()
    reference.save_pretrained(tmp_path / "float")
    model = load_quantized(tmp_path / "float", "int8:g32", head="int4:g32:asym")
    assert any(isinstance(m, QuantizedModule) for m in model.modules())
    save_quantized(model, tmp_path / "quantized", shard=20_000)
    again = load_model(tmp_path / "quantized")
    assert same(model, again)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected, got = reference(ids).logits, model(ids).logits
        assert torch.equal(got, again(ids).logits)
        # Four bits in the head, and routers may turn: the same function, roughly.
        assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.9


def test_a_tied_embedding_shares_the_codes_in_memory_and_in_the_file(tmp_path: Path) -> None:
    FAMILIES["llama_tied"].build().save_pretrained(tmp_path / "float")
    model = load_quantized(tmp_path / "float")
    save_quantized(model, tmp_path / "quantized")
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    assert len([name for name in stored if name.startswith(("lm_head", "model.embed_tokens"))]) == 2
    for one in (model, load_checkpoint(tmp_path / "quantized")):
        embedding, head = one.model.embed_tokens, one.lm_head
        assert isinstance(embedding, QuantizedEmbedding)
        assert isinstance(head, QuantizedLinear)
        assert embedding.codes is head.codes
        assert embedding.scales is head.scales


def test_an_act_order_checkpoint_is_saved_with_its_order(tmp_path: Path) -> None:
    packers.write(FAMILIES["llama"].build(), tmp_path / "gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32},
                  lambda n, k: random_matrix(n, k, 32, act_order=True), packers.gptq)  # fmt: skip
    model = load_checkpoint(tmp_path / "gptq")
    assert model.model.layers[0].mlp.up_proj.order is not None
    save_quantized(model, tmp_path / "own")
    assert same(model, load_checkpoint(tmp_path / "own"))


def test_what_stands_beside_the_weights_is_kept(llama: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    reference, path = llama
    (path / "tokenizer.json").write_text("{}")
    reference.generation_config.update(do_sample=True, top_k=7)
    reference.generation_config.save_pretrained(path)
    save_quantized(load_quantized(path), tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert load_checkpoint(tmp_path / "new").generation_config.top_k == 7
    assert not [p for p in (tmp_path / "new").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_a_converted_model_is_saved_as_it_is(llama: tuple[torch.nn.Module, Path], tmp_path: Path, convert) -> None:
    model = convert(load_quantized(llama[1], "int8:g32"))
    save_quantized(model, tmp_path / "own")
    loaded = load_model(tmp_path / "own")
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert {n: t.dtype for n, t in wanted.items()} == {n: t.dtype for n, t in got.items()}
    with pytest.raises(InputError, match="float64"):
        save_quantized(model.double(), tmp_path / "double")


def test_a_converted_table_gives_the_new_dtype(tmp_path: Path) -> None:
    FAMILIES["llama_tied"].build().save_pretrained(tmp_path)
    model = load_quantized(tmp_path).to(torch.bfloat16)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model(torch.tensor([[5, 6]])).logits.dtype is torch.bfloat16


def test_stacks_of_experts_are_announced_as_floats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FAMILIES["mixtral"].build().save_pretrained(tmp_path)
    load_quantized(tmp_path, "int8")
    assert "stacks of matrices stay floats" in caplog.text


def test_what_cannot_be_saved(llama: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    reference, path = llama
    with pytest.raises(CheckpointError, match="no quantized module"):
        save_quantized(reference, tmp_path / "new")
    model = load_quantized(path)
    with pytest.raises(CheckpointError, match="holds weights already"):
        save_quantized(model, path)
    (tmp_path / "file").write_text("")
    for given, text in (({"directory": None}, "directory is None"), ({"source": 3}, "source is 3"),
                        ({"source": "/no/such"}, "no directory /no/such"), ({"model": "x"}, "the model is a str"),
                        ({"directory": tmp_path / "file" / "below"}, "cannot be written")):  # fmt: skip
        with pytest.raises(InputError, match=text):
            save_quantized(**{"model": model, "directory": tmp_path / "new", **given})
    with pytest.raises(CheckpointError, match="is a file"):
        save_quantized(model, tmp_path / "file")
    for shard in ("5GB", 0, 1.5, True):
        with pytest.raises(InputError, match="shard is"):
            save_quantized(model, tmp_path / "new", shard=shard)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="meta device"):
        save_quantized(model.to("meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_configuration_of_other_schemes_is_refused(llama: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    save_quantized(load_quantized(llama[1], "int8:g32"), tmp_path / "new")
    file = tmp_path / "new" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["schemes"]["lm_head"] = "int4:g32"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="other quantization schemes"):
        load_checkpoint(tmp_path / "new")


MEMORY = """
import re, sys, threading, time, torch
from accelc import checkpoints
import transformers.models.llama.modeling_llama

torch.set_num_threads(1)

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

before = peak = anonymous()
done = False
watcher = threading.Thread(target=watch)
watcher.start()
model = getattr(checkpoints, sys.argv[1])(*sys.argv[2:])
done = True
watcher.join()
held = sum(t.nbytes for t in {id(p): p for p in model.parameters()}.values())
print(before, max(peak, anonymous()), held)
"""
"""What a process of its own prints. Pages of the files themselves, which the system may drop, do not count."""


def measured(function: str, path: Path, *options: str) -> tuple[int, int]:
    """Bytes by which the memory of a fresh process grew at most, the least of three, and those that the model holds."""
    command = [sys.executable, "-c", MEMORY, function, str(path), *options]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    return min(int(after) - int(before) for before, after, _ in runs), int(runs[0][2])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_float_model_is_never_in_memory(tmp_path: Path) -> None:
    """Four layers more, 28 MiB each in fp32, cost what their codes take, and less than one layer on top."""
    from transformers import LlamaConfig, LlamaForCausalLM

    peaks: dict[str, list[int]] = {"load_quantized": [], "load_checkpoint": []}
    sizes = []
    for layers in (1, 5):
        folder = tmp_path / str(layers)
        config = LlamaConfig(vocab_size=256, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers,
                             num_attention_heads=8)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "float")
        peak, held = measured("load_quantized", folder / "float", "int8")
        peaks["load_quantized"].append(peak)
        sizes.append(held)
        save_quantized(load_quantized(folder / "float", "int8"), folder / "own")
        peaks["load_checkpoint"].append(measured("load_checkpoint", folder / "own")[0])
    codes = sizes[1] - sizes[0]
    assert 27 * 2**20 < codes < 30 * 2**20
    for low, high in peaks.values():
        assert codes / 2 < high - low < codes + 20 * 2**20


def test_rounding_is_what_the_pass_does(llama: tuple[torch.nn.Module, Path]) -> None:
    reference, path = llama
    made = load_quantized(path).model.layers[0].mlp.up_proj.weight_value()
    expected = round_to_nearest(reference.model.layers[0].mlp.up_proj.weight.detach(), Scheme.parse("int4"))
    assert torch.equal(made.codes, expected.codes)
