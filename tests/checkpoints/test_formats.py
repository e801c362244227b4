"""What is loaded from each format is exactly (code - zero) * scale, and the model computes with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from greedy import reference as continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelc
from accelc.capture import load_model
from accelc.checkpoints import save_quantized
from accelc.checkpoints.awq import Awq
from accelc.checkpoints.compressed_tensors import CompressedTensors
from accelc.checkpoints.formats import Format
from accelc.checkpoints.gptq import Gptq
from accelc.ir.errors import CheckpointFormatError
from accelc.quantized_linear import QuantizedLinear, QuantizedStack

from . import packers
from .packers import Quantized, random_matrix


def loaded(form: Format, tensors: dict[str, Tensor], q: Quantized) -> Tensor:
    """The weight, its columns back in the order of the checkpoint, after what every load checks."""
    rows, columns = q.codes.shape
    expected = form.expected("m", rows, columns)
    assert tensors.keys() <= expected.keys()
    for name, want in expected.items():
        if name in tensors or not want.optional:
            assert tuple(tensors[name].shape) in want.shapes
            assert tensors[name].dtype in want.dtypes
    weight, order = form.matrix("m", tensors, rows, columns)
    module = QuantizedLinear(weight, None, order)
    x = torch.eye(columns)
    torch.testing.assert_close(module(x).T, q.weight, atol=1e-3, rtol=1e-3)  # the forward keeps the order, too
    return module.weight


SHAPES = {"rows": st.integers(1, 6).map(lambda n: 8 * n), "columns": st.integers(1, 9).map(lambda n: 32 * n)}
GROUP = st.sampled_from([-1, 32, 64, 96, 128, 256, 512])


@settings(max_examples=40, deadline=None)
@given(**SHAPES, group=GROUP, bits=st.sampled_from([4, 8]), symmetric=st.booleans(), v2=st.booleans(),
       form=st.sampled_from(["g_idx", "no g_idx", "act-order"]))  # fmt: skip
def test_gptq(rows: int, columns: int, group: int, bits: int, symmetric: bool, v2: bool, form: str) -> None:
    q = random_matrix(rows, columns, group, bits=bits, symmetric=symmetric, act_order=form == "act-order")
    config = {"bits": bits, "group_size": group, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    tensors = packers.gptq(q, v2=v2, g_idx=form != "no g_idx")
    assert torch.equal(loaded(Gptq.of(config), tensors, q), q.weight)


@settings(max_examples=25, deadline=None)
@given(**SHAPES, group=GROUP, symmetric=st.booleans())
def test_awq(rows: int, columns: int, group: int, symmetric: bool) -> None:
    q = random_matrix(rows, columns, group, symmetric=symmetric)
    config = {"bits": 4, "group_size": group, "version": "GEMM", "zero_point": True}
    assert torch.equal(loaded(Awq.of(config), packers.awq(q), q), q.weight)


def group_config(bits: int, group: int, symmetric: bool, form: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group > 0 else "channel",
               "group_size": group if group > 0 else None}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **more}},
        "ignore": ["lm_head"],
    }


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 200), group=GROUP, bits=st.sampled_from([4, 8]),
       symmetric=st.booleans(), form=st.sampled_from(["pack-quantized", "int-quantized"]),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))  # fmt: skip
def test_compressed_tensors(
    rows: int, columns: int, group: int, bits: int, symmetric: bool, form: str, dtype: torch.dtype
) -> None:
    q = random_matrix(rows, columns, group, bits=bits, symmetric=symmetric, dtype=dtype)
    pack = packers.packed if form == "pack-quantized" else packers.plain
    read = CompressedTensors.of(group_config(bits, group, symmetric, form))
    assert torch.equal(loaded(read, pack(q, symmetric=symmetric), q), q.weight)


def test_compressed_tensors_with_moved_columns_one_scale_and_activations() -> None:
    q = random_matrix(8, 128, 32, act_order=True)
    read = CompressedTensors.of(group_config(4, 32, False, "pack-quantized"))
    tensors = packers.packed(q, symmetric=False) | {"weight_g_idx": q.groups.to(torch.int32)}
    assert torch.equal(loaded(read, tensors, q), q.weight)
    one = random_matrix(8, 64, -1, bits=8, symmetric=True)
    one.scales = one.scales[:1].expand(8, 1)
    config = group_config(8, -1, True, "int-quantized", input_activations={"num_bits": 8, "dynamic": True})
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    tensors = packers.plain(one, symmetric=True) | {"weight_scale": one.scales[0].clone()}
    assert torch.equal(loaded(CompressedTensors.of(config), tensors, one), one.weight)


def test_groups_of_a_config_are_chosen_by_name_first() -> None:
    config = group_config(4, 32, True, "pack-quantized")
    eight = group_config(8, -1, True, "int-quantized")["config_groups"]["group_0"] | {"format": "int-quantized"}
    config["config_groups"]["group_1"] = eight | {"targets": ["re:.*down_proj"]}
    read = CompressedTensors.of(config)
    assert "weight_packed" in read.expected("model.layers.0.mlp.up_proj", 32, 32)
    assert "weight" in read.expected("model.layers.0.mlp.down_proj", 32, 32)


def test_gptq_modules_with_settings_of_their_own() -> None:
    read = Gptq.of({"bits": 4, "group_size": 128, "dynamic": {r"+:.*\.down_proj$": {"bits": 8, "group_size": 32}}})
    q = random_matrix(16, 64, 32, bits=8)
    weight, _ = read.matrix("layers.0.down_proj", packers.gptq(q), 16, 64)
    assert torch.equal(weight.dequantize(), q.weight)
    assert read.expected("layers.0.up_proj", 16, 256)["qweight"].shapes == ((32, 16),)


def test_zeros_that_are_all_in_the_middle_are_not_stored() -> None:
    q = random_matrix(16, 64, 32, symmetric=True)
    weight, order = Gptq.of({"bits": 4, "group_size": 32}).matrix("m", packers.gptq(q), 16, 64)
    assert weight.zeros is None
    assert order is None
    assert str(weight.scheme) == "int4:g32:fp16"


@pytest.mark.parametrize("group", [16, 48])
def test_groups_that_are_no_runs_of_32_are_refused(group: int) -> None:
    q = random_matrix(8, 96, group)
    with pytest.raises(
        CheckpointFormatError, match=rf"m: its groups have {group} to {group} columns.*\n.*multiple of 32"
    ):
        Awq.of({"group_size": group}).matrix("m", packers.awq(q), 8, 96)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
WHOLE: dict[str, tuple[dict[str, Any], Callable[..., Quantized], Callable[..., dict[str, Tensor]]]] = {
    "gptq": (GPTQ, partial(random_matrix, group=32), packers.gptq),
    "gptq act-order": (GPTQ | {"desc_act": True}, partial(random_matrix, group=32, act_order=True), packers.gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
            partial(random_matrix, group=64), packers.awq),
    "pack-quantized": (group_config(4, 32, True, "pack-quantized"),
                       partial(random_matrix, group=32, symmetric=True), partial(packers.packed, symmetric=True)),
    "int-quantized": (group_config(8, -1, True, "int-quantized"),
                      partial(random_matrix, group=-1, bits=8, symmetric=True), partial(packers.plain, symmetric=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("family", ["llama_tied", "qwen2"])
def test_a_directory_loads_as_the_model_it_means(name: str, family: str, tmp_path: Path) -> None:
    config, make, pack = WHOLE[name]
    reference = FAMILIES[family].build()
    matrices = packers.write(reference, tmp_path, config, make, pack)
    model = load_model(tmp_path)
    made = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert made.keys() == matrices.keys()
    for path, module in made.items():
        assert torch.equal(module.weight, matrices[path].weight)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "gptq act-order"])
def test_experts_become_stacks_of_codes(name: str, tmp_path: Path) -> None:
    """And a decoder multiplies them as such: nothing is dequantized."""
    config, make, pack = WHOLE[name]
    reference = FAMILIES["mixtral"].build()
    packers.write_experts(reference, tmp_path / "files", config, make, pack)
    model = load_model(tmp_path / "files")
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedStack)}
    assert len(stacks) == 2 * len(model.model.layers)
    for path, stack in stacks.items():
        assert torch.equal(stack.weight, reference.get_parameter(path.removesuffix("_quantized")))
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, reference(ids).logits, atol=2e-2, rtol=2e-2)
        save_quantized(model, tmp_path / "own", shard=20_000)
        assert torch.equal(load_model(tmp_path / "own")(ids).logits, logits)
    decoder = accelc.compile(tmp_path / "files", max_length=32)
    nodes = [node.target for node in decoder.programs["step"].graph.nodes]
    assert nodes.count(torch.ops.accelc.quantized_grouped_linear.default) == len(stacks)
    assert torch.ops.accelc.dequantize.default not in nodes
    for row, tokens in zip(ids, decoder.generate(ids, max_new_tokens=12, ignore_eos=True).tokens, strict=True):
        assert tokens.tolist() == continuation(model, row, 12)


def test_experts_with_and_without_zeros_get_zeros(tmp_path: Path) -> None:
    symmetric = itertools.cycle([True, False])
    reference = FAMILIES["mixtral"].build()
    packers.write_experts(reference, tmp_path, GPTQ,
                          lambda n, k: random_matrix(n, k, 32, symmetric=next(symmetric)), packers.gptq)  # fmt: skip
    experts = load_model(tmp_path).model.layers[1].mlp.experts
    assert experts.down_proj_quantized.zeros is not None
    for stack in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(experts, stack), getattr(reference.model.layers[1].mlp.experts, stack))
