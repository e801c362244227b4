"""Directories that are damaged, incomplete or of another kind: named errors, before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Expect, names
from models import library
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from accelc.capture import load_model
from accelc.checkpoints import load_checkpoint, load_quantized, quantization_of, save_quantized
from accelc.checkpoints.files import TensorFiles
from accelc.ir.errors import CheckpointError, CheckpointFormatError

from . import packers
from .packers import random_matrix

Change = Callable[[dict[str, Tensor]], Any]
PROJECTION = "model.layers.1.mlp.up_proj"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    packers.write(FAMILIES["llama"].build(), tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32},
                  partial(random_matrix, group=32), packers.gptq)  # fmt: skip
    return tmp_path


def edit(directory: Path, change: Change, metadata: dict[str, str] | None = None) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata)


def settings(directory: Path, **changed: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(changed)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{PROJECTION}.qzeros"), r"up_proj\.qzeros is missing, expected int32 \[2, 16\]"),
        (lambda t: t.pop(f"{PROJECTION}.qweight"), r"up_proj\.qweight is missing, expected int32 \[8, 128\]"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(PROJECTION)],
         r"up_proj\.weight is missing, expected a tensor of shape \[128, 64\]"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing, expected a tensor of shape \[64\]"),
        (lambda t: t.update({f"{PROJECTION}.scales": torch.ones(3, 128, dtype=torch.float16)}),
         r"up_proj\.scales is float16 \[3, 128\] in model\.safetensors, expected float16.* \[2, 128\]"),
        (lambda t: t.update({f"{PROJECTION}.qweight": torch.ones(8, 128)}),
         r"up_proj\.qweight is float32 \[8, 128\] in model\.safetensors, expected int32 \[8, 128\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}),
         r"model\.norm\.weight is float32 \[65\] in model\.safetensors, expected float32 \[64\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
         r"model\.norm\.weight is int32 \[64\] .*expected float32 \[64\]"),
        (lambda t: t.update({"model.layers.7.qweight": torch.ones(1)}), r"layers\.7 is quantized, but the model lacks"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), r"model\.extra .*is unexpected"),
        (lambda t: t.update({f"{PROJECTION}.g_idx": torch.full((64,), 9, dtype=torch.int32)}),
         r"up_proj\.g_idx names a group outside of the 2"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], Any], text: str, directory: Path
) -> None:
    edit(directory, change)
    with pytest.raises(CheckpointError, match=text):
        load_model(directory)


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{EXPERT}.scales"), r"experts\.1\.w1\.scales is missing"),
        (lambda t: t.update({f"{EXPERT}.scales": torch.ones(3, 3)}), r"experts\.1\.w1\.scales is float32 \[3, 3\]"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith(EXPERT)],
            r"experts\.1\.w1\.weight is missing: the model has 4 experts in .*gate_up_proj",
        ),
        (
            lambda t: t.update({n.replace("ts.1", "ts.4"): x.clone() for n, x in t.items() if n.startswith(EXPERT)}),
            r"experts\.4\.w1\.weight is unexpected: the model has 4 experts",
        ),
        (lambda t: [t.pop(n) for n in list(t) if "layers.0.block_sparse_moe.experts" in n], r"experts\.\w+ is missing"),
        (lambda t: t.update({f"{EXPERT}.bias": torch.ones(96)}), r"experts\.1\.w1\.bias .*is unexpected"),
    ],
)
def test_experts_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], Any], text: str, tmp_path: Path
) -> None:
    model = FAMILIES["mixtral"].build()
    packers.write_experts(model, tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32},
                          partial(random_matrix, group=32), packers.gptq)  # fmt: skip
    load_model(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=text):
        load_model(tmp_path)


def test_experts_with_moved_columns_are_refused(tmp_path: Path) -> None:
    form = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    packers.write_experts(FAMILIES["mixtral"].build(), tmp_path / "order", form,
                          partial(random_matrix, group=32, act_order=True), packers.gptq)  # fmt: skip
    with pytest.raises(CheckpointFormatError, match=r"experts\.0\.w\d is an expert whose columns are moved"):
        load_model(tmp_path / "order")


def test_all_problems_are_in_one_error(directory: Path) -> None:
    edit(directory, lambda t: [t.pop(n) for n in list(t) if n.endswith("scales")])
    with pytest.raises(CheckpointError, match=r"14 tensors do not fit the model:\n(.*\n){6}.*and 8 more"):
        load_model(directory)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"quant_method": "magic"}, r"quant_method is 'magic'[\s\S]*gptq, awq, compressed-tensors, accelc"),
        ({"bits": 3}, r"bits is 3[\s\S]*Known: 4, 8"),
        ({"group_size": "many"}, "group_size is 'many'"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin'[\s\S]*gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, r"version is 'gemv'[\s\S]*gemm"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"dynamic": {"[": {}}}, r"dynamic has the pattern '\['"),
        ({"dynamic": [1]}, "dynamic is no object of objects"),
        ({"quant_method": "accelc", "version": 9}, "version is 9"),
    ],
)
def test_settings_that_are_not_known_list_the_choices(changed: dict[str, Any], text: str, directory: Path) -> None:
    settings(directory, **changed)
    with pytest.raises(CheckpointFormatError, match=text):
        load_model(directory)


def test_truncated_files(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 3, 0):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing, truncated or no safetensors file"):
            load_model(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match="no safetensors files"):
        load_model(directory)


def test_indices_are_followed_and_not_trusted(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "old.safetensors.bin")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, listed in halves.items():
        save_file({name: tensors[name].clone() for name in listed}, directory / file)
    where = {name: file for file, listed in halves.items() for name in listed}
    index = directory / "model.safetensors.index.json"

    def write(**more: str) -> None:
        index.write_text(json.dumps({"weight_map": where | more}))

    write()
    assert TensorFiles.of(directory).entries.keys() == tensors.keys()
    load_model(directory)
    write(**{"not.there": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"promises the tensor not\.there"):
        load_model(directory)
    write(x="../a.safetensors")
    with pytest.raises(CheckpointError, match="outside of its directory"):
        load_model(directory)
    write(x="c.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors is missing"):
        load_model(directory)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(directory)


def test_settings_of_older_files_are_found(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    found = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    assert quantization_of(directory) is None
    with pytest.raises(CheckpointError, match=r"unexpected|missing"):
        load_quantized(directory)
    (directory / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 64}))
    assert quantization_of(directory) == {"quant_method": "awq", "bits": 4, "group_size": 64}
    found.pop("quant_method")
    (directory / "quantize_config.json").write_text(json.dumps(found))
    load_checkpoint(directory)


def test_loading_what_is_or_is_not_quantized_the_other_way(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match="quantized already"):
        load_quantized(directory)
    FAMILIES["llama"].build().save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointFormatError, match="not quantized"):
        load_checkpoint(tmp_path / "float")


ATTENTION = "model.layers.1.self_attn.q_proj"
EXPERTS = "model.layers.0.block_sparse_moe.experts"


@pytest.mark.parametrize("load", [load_model, load_quantized])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{ATTENTION}.weight"), r"q_proj\.weight is missing, expected a tensor of shape \[64, 64\]"),
        (lambda t: t.update({f"{ATTENTION}.weight": torch.ones(64, 65)}), r"q_proj\.weight is float32 \[64, 65\]"),
        (lambda t: t.update({f"{ATTENTION}.weight": torch.ones(64, 64, dtype=torch.int32)}),
         r"q_proj\.weight is int32 \[64, 64\] in model\.safetensors, expected float32 \[64, 64\]"),
        (lambda t: t.update({f"{ATTENTION}.bias": torch.ones(64)}), r"q_proj\.bias .*is unexpected"),
        (lambda t: t.pop(f"{EXPERTS}.2.w3.weight"), r"experts\.2\.w3\.weight is missing: the model has 4 experts"),
        (lambda t: [t.pop(f"{EXPERTS}.{i}.w3.weight") for i in range(4)], r"experts\.3\.w3\.weight is missing"),
        (lambda t: t.update({f"{EXPERTS}.4.w1.weight": torch.ones(96, 64)}), r"experts\.4\.w1\.weight is unexpected"),
        (lambda t: t.update({f"{EXPERTS}.1.w1.weight": torch.ones(95, 64)}), r"1\.w1\.weight is .*\[95, 64\].* beside"),
        (lambda t: [t.update({f"{EXPERTS}.{i}.w1.weight": torch.ones(95, 64)}) for i in range(4)],
         r"gate_up_proj, made of 8 tensors .* has the shape \[4, \d+, 64\], expected \[4, \d+, 64\]"),
        (lambda t: [t.update({f"{EXPERTS}.{i}.w1.weight": torch.ones(96, 65)}) for i in range(4)],
         r"gate_up_proj cannot be made of 8 tensors from .*experts\.0\.w1\.weight on: "),
        (lambda t: t.update({f"{EXPERTS}.1.w1.weight": torch.ones(96, 64).to(torch.int8)}), r"1\.w1\.weight is int8"),
    ],
)  # fmt: skip
def test_floats_that_do_not_fit_are_named(
    load: Callable[[Path], Any], change: Callable[[dict[str, Tensor]], Any], text: str, tmp_path: Path
) -> None:
    """transformers would make up what is missing, and leave out what is not."""
    FAMILIES["mixtral"].build().save_pretrained(tmp_path)
    load(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path)


@pytest.mark.parametrize("family", [name for name in names(Expect.DERIVED) if name in library.LIBRARY])
def test_every_family_is_loaded_as_it_was_saved(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_codes_are_not_taken_for_floats_nor_floats_for_codes(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "float")
    path = tmp_path / "own"
    save_quantized(load_quantized(tmp_path / "float"), path)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()

    def change(tensors: dict[str, Tensor]) -> None:
        for last in ("codes", "scales"):
            del tensors[f"{ATTENTION}.{last}"]
        tensors[f"{ATTENTION}.weight"] = torch.ones(64, 64)

    edit(path, lambda tensors: None)
    with pytest.raises(CheckpointError, match=r"header of model\.safetensors lacks 'accelc\.modules'"):
        load_model(path)
    edit(path, change, metadata)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight \(float32 .*\) is in place of the codes of .*q_proj"):
        load_model(path)
    edit(path, lambda tensors: [tensors.pop(f"{ATTENTION}.weight")], metadata)
    with pytest.raises(CheckpointError, match=r"q_proj lacks codes, scales: save_quantized wrote codes, scales"):
        load_model(path)
    config = json.loads((path / "config.json").read_text())
    for given, text in (
        (None, "hold quantized weights, and its config.json has no quantization_config"),
        ({}, "hold quantized weights, and its config.json has no quantization_config"),
        ("accelc", "quantization_config is 'accelc', no object"),
        ([4], r"quantization_config is \[4\], no object"),
    ):
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
        for load in (load_model, load_quantized):
            with pytest.raises(CheckpointError, match=text if given is None or load is load_model else ""):
                load(path)


def own_copy(tmp_path: Path, **options: Any) -> Path:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "float")
    save_quantized(load_quantized(tmp_path / "float", "int4:g32"), tmp_path / "own", **options)
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"intermediate_size": 120}, r"(gate|up|down)_proj was saved as a matrix .*128.* config\.json wants .*120"),
        ({"vocab_size": 98}, r"lm_head was saved as a matrix \[97, 64\], and config\.json wants \[98, 64\]|\[97, 64\]"),
    ],
)
def test_sizes_that_padding_would_hide_are_compared(change: dict[str, int], text: str, tmp_path: Path) -> None:
    path = own_copy(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=text):
        load_model(path)


def test_a_bias_that_the_model_has_not_is_zero_or_an_error(directory: Path, tmp_path: Path) -> None:
    bare = load_model(directory).state_dict()
    edit(directory, lambda t: t.update({f"{PROJECTION}.bias": torch.zeros(128)}))
    assert load_model(directory).state_dict().keys() == bare.keys()
    edit(directory, lambda t: t.update({f"{PROJECTION}.bias": torch.ones(128)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.bias is unexpected"):
        load_model(directory)
    path = own_copy(tmp_path / "more")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    edit(path, lambda t: t.update({f"{PROJECTION}.bias": torch.zeros(128)}), metadata)
    with pytest.raises(CheckpointError, match=r"up_proj has bias besides: save_quantized wrote codes, scales"):
        load_model(path)


def test_shards_are_of_one_model(tmp_path: Path) -> None:
    path = own_copy(tmp_path, shard=9000)
    other = tmp_path / "other"
    save_quantized(load_quantized(tmp_path / "float", "int4:g64"), other, shard=9000)
    first = sorted(path.glob("*.safetensors"))[0].name
    load_model(path)
    (path / first).write_bytes((other / first).read_bytes())
    with pytest.raises(CheckpointError, match=r"are not of one model|which is not there"):
        load_model(path)


def test_numbers_that_are_none_are_named(directory: Path, tmp_path: Path) -> None:
    edit(directory, lambda t: t[f"{PROJECTION}.scales"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"the scales of .*up_proj hold NaN"):
        load_model(directory)
    FAMILIES["llama"].build().save_pretrained(tmp_path / "float")
    edit(tmp_path / "float", lambda t: t["model.norm.weight"].fill_(1e6))
    load_quantized(tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinite values in float16"):
        load_quantized(tmp_path / "float", dtype=torch.float16)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "64"}, {"num_attention_heads": 0}, {"hidden_size": -64}, {"dtype": "foo"},
     {"rope_parameters": [1]}, {"num_hidden_layers": None}, {"pad_token_id": 500}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("load", [load_model, load_quantized])
def test_numbers_that_make_no_model_are_named(change: dict[str, Any], load: Any, tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=r"no model can be made of .*config\.json"):
        load(tmp_path)


def test_code_in_a_directory_is_not_asked_for(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_quantized):
        with pytest.raises(CheckpointError, match="no model can be made"):
            load(tmp_path)


def test_settings_of_generating_are_named_by_themselves(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        load_quantized(tmp_path)


def test_no_model_can_be_made_of_the_configuration(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "no such"}))
    with pytest.raises(CheckpointError, match=r"no model can be made of .*config\.json"):
        load_model(directory)
