"""Models loaded from quantized checkpoints are compiled like others, and decode what the dequantized model decodes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import packers
from checkpoints.packers import random_matrix
from families import FAMILIES
from torch import nn

import accelc
from accelc.capture import capture
from accelc.checkpoints import load_checkpoint, load_quantized
from accelc.ir.quantized import Scheme
from accelc.ir.rounding import round_to_nearest
from accelc.pipeline import step_pipeline
from accelc.quantized_linear import QuantizedLinear

NEW = 12
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
LINEAR = torch.ops.accelc.quantized_linear.default


def greedy(model: nn.Module, ids: torch.Tensor) -> list[int]:
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_gptq_directory_decodes_like_its_dequantized_weights(family: str, act_order: bool, tmp_path: Path) -> None:
    reference = FAMILIES[family].build()
    packers.write(reference, tmp_path, GPTQ, partial(random_matrix, group=32, act_order=act_order), packers.gptq)
    decoder = accelc.compile(tmp_path, max_length=32, cache=False, eos=[])
    assert LINEAR in {node.target for node in decoder.programs["step"].graph.nodes}
    ids = torch.tensor([[5, 9, 2, 40]])
    assert decoder.generate(ids, max_new_tokens=NEW).tokens[0].tolist() == greedy(reference, ids)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma2", "deepseek_v3", "mixtral"])
def test_models_of_quantized_modules_are_derived(family: str, tmp_path: Path) -> None:
    """Tied embeddings, transposed weights, embeddings that scale, latent attention, experts: all logits of a decode."""
    reference = FAMILIES[family].build()
    reference.save_pretrained(tmp_path)
    model = load_quantized(tmp_path, "int8:g32", head="int8:g32")
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    quantized = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    with torch.no_grad():
        for name in quantized:
            weight = parameters[f"{name}.weight"]
            turned = weight.T if family == "gpt2" and name != "lm_head" else weight
            turned.copy_(round_to_nearest(turned.clone(), Scheme.parse("int8:g32")).dequantize())
    if family == "gemma2":  # its embedding scales what it looks up, and keeps its floats
        model_table, table = model.model.embed_tokens.weight, reference.model.embed_tokens.weight
        assert not torch.equal(model_table, table)
        with torch.no_grad():
            reference.lm_head.weight = nn.Parameter(table.detach().clone())
            table.copy_(model_table)
    step = step_pipeline().run(capture(model, max_length=32))
    assert sum(node.target is LINEAR for node in step.graph.nodes) >= len(quantized)
    tokens = torch.randint(3, 90, (2, 9))
    states = [s.allocate(2, 16) for s in step.states]
    got = []
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        positions = torch.arange(begin, end).expand(2, -1)
        got.append(step.run(tokens[:, begin:end], positions, torch.full((2,), begin), *states)[0])
    with torch.no_grad():
        expected = reference(tokens).logits
    # The kernel for codes takes activations in fixed point; a wrong derivation is off by the size of the logits.
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-2, rtol=2e-2)


def test_code_that_reads_a_weight_gets_the_dequantized_one(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            return hidden @ self.model.lm_head.weight.T

    reference = FAMILIES["llama"].build()

    def pack(q: packers.Quantized) -> dict[str, torch.Tensor]:
        return packers.packed(q, symmetric=False) | {"weight_g_idx": q.groups.to(torch.int32)}

    weights = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32, "actorder": "group"}
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    packers.write(reference, tmp_path, config, partial(random_matrix, group=32, act_order=True), pack, skip="")
    decoder = accelc.compile(Reads(load_checkpoint(tmp_path)), max_length=32, cache=False, eos=[])
    ids = torch.tensor([[5, 9, 2, 40]])
    assert decoder.generate(ids, max_new_tokens=NEW).tokens[0].tolist() == greedy(reference, ids)


def test_programs_of_a_checkpoint_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another checkpoint of the same shape as well: what is compiled does not depend on the codes."""
    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path / "cache"))
    ids, notices = torch.tensor([[5, 9, 2, 40]]), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        reference = FAMILIES["llama"].build()
        packers.write(reference, tmp_path / str(seed), GPTQ, partial(random_matrix, group=32), packers.gptq)
        decoder = accelc.compile(tmp_path / str(seed), max_length=32, backend="eager", eos=[])
        assert decoder.generate(ids, max_new_tokens=NEW).tokens[0].tolist() == greedy(reference, ids)
        notices.append(" ".join(decoder.report.notices))
    assert "from the cache" not in notices[0]
    assert "from the cache" in notices[1]
