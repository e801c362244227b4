"""Regions of whole models: they compute what the program does, and are as few as the templates allow."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from families import FAMILIES, sampled
from torch import Tensor

from accelc.capture import capture
from accelc.codegen.fusion import Fusion, partition
from accelc.codegen.fusion.regions import Form
from accelc.codegen.regions import region_module
from accelc.ir import Program
from accelc.passes import Pipeline
from accelc.passes.quantize_weights import QuantizeWeights
from accelc.pipeline import step_pipeline, verify_pipeline


def derived(family: str) -> Program:
    return step_pipeline().run(capture(FAMILIES[family].build(), max_length=32))


def inputs_of(program: Program, new: int) -> list[Tensor]:
    """Two rows of `new` tokens behind three and five that are there already."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 5])
    known = {
        "tokens": torch.randint(3, 90, (2, new), generator=generator),
        "positions": lengths[:, None] + torch.arange(new),
        "lengths": lengths,
        "tree": ((2 << torch.arange(new)) - 1).expand(2, new)[..., None],
    }
    assert set(program.inputs) <= known.keys()
    states = [torch.randn(s.sizes(2, 16), generator=generator).to(s.dtype) for s in program.states]
    return [*(known[name].contiguous() for name in program.inputs), *states]


def run_regions(fusion: Fusion, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a program, one region after the other by its reference."""
    program = fusion.program
    known: dict[fx.Node, Tensor] = dict(zip(program.placeholders(), inputs, strict=True))
    attributes = program.tensors()
    for region in fusion.regions:
        part = fusion.part(region)
        given = [attributes[str(n.target)] if n.op == "get_attr" else known[n] for n in part.inputs]
        with torch.no_grad():
            made = region_module(part)(*given)
        known.update(zip(part.outputs, made, strict=True))
    rest = fx.Interpreter(program.module)
    rest.env.update(known)
    for node in program.graph.nodes:
        free = node.op == "get_attr" or (node.op == "call_function" and node not in fusion.values.work)
        if free and node not in rest.env and all(n in rest.env for n in node.all_input_nodes):
            rest.env[node] = rest.run_node(node)
    return [rest.env[n] for n in program.graph.output_node().args[0]]


@pytest.mark.parametrize("family", sampled())
def test_regions_compute_what_the_program_does(family: str) -> None:
    program = derived(family)
    fusion = partition(program)
    nodes = [node for region in fusion.regions for node in region.nodes]
    assert len(nodes) == len(set(nodes)) == len(fusion.values.work)
    for new in (1, 4):
        inputs, again = inputs_of(program, new), inputs_of(program, new)
        wanted, got = program.run(*inputs), run_regions(fusion, again)
        for one, other in zip([*wanted, *inputs], [*got, *again], strict=True):
            torch.testing.assert_close(other, one, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_quantized_step_of_a_tree_has_regions_too(family: str) -> None:
    program = verify_pipeline().run(Pipeline([QuantizeWeights("int4:g32")]).run(derived(family)))
    fusion = partition(program)
    inputs, again = inputs_of(program, 4), inputs_of(program, 4)
    for one, other in zip(program.run(*inputs), run_regions(fusion, again), strict=True):
        torch.testing.assert_close(other, one, atol=2e-3, rtol=2e-3)


def two_layers(name: str) -> torch.nn.Module:
    """Real widths, so that a norm does not fit into a tile."""
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    wide: dict[str, int] = {"vocab_size": 4000, "hidden_size": 1024, "intermediate_size": 2048}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**wide, **layers)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**wide, **layers, head_dim=128)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=4000, n_embd=1024, n_layer=2, n_head=16)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=4000, hidden_size=1024, n_layer=2, n_head=16)),
    }
    torch.manual_seed(0)
    return made[name]().eval()


@pytest.mark.parametrize(("name", "unfused"), [("llama", 38), ("gemma2", 45), ("gpt2", 28), ("bloom", 29)])
def test_a_layer_is_five_regions(name: str, unfused: int) -> None:
    """Attention is two kernels: the parts of the cache, and their sum."""
    fusion = partition(step_pipeline().run(capture(two_layers(name), max_length=1024)))
    assert fusion.unfused == unfused
    assert len(fusion.regions) == 2 * 5 + 1
    assert fusion.kernels == 2 * 6 + 1
    assert [region.form for region in fusion.regions].count(Form.ATTENTION) == 2
    for sizes in ((1, 1, 64), (8, 1, 1024), (1, 64, 1024)):
        moved, least = fusion.cost.at(*sizes), fusion.floor.at(*sizes)
        assert moved.weights == pytest.approx(least.weights, rel=1e-6)
        assert moved.states == least.states
        assert least.bytes <= moved.bytes <= (1.10 if sizes[1] == 1 else 1.4) * least.bytes
    assert moved.states == sum(s.bytes_per_token() for s in fusion.program.states) * 1024


def test_the_same_program_has_the_same_regions() -> None:
    first, second = (partition(derived("gpt2")) for _ in range(2))
    assert [region.name for region in first.regions] == [region.name for region in second.regions]


def test_bytes_and_operations_are_those_of_a_layer() -> None:
    """By hand, for the first layer's gate and up of a Llama of 64 columns and 128 rows each."""
    region = next(r for r in partition(derived("llama")).regions if "gated_activation" in r.kind)
    cost = region.cost.at(2, 3, 32)
    norm, rows = 64 * 4, 2 * 3
    assert cost.weights == 2 * 64 * 128 * 4 + norm
    assert cost.values == rows * (64 + 128) * 4
    assert cost.states == 0
    products = 2 * rows * 64 * 256
    assert products < cost.flops < 1.1 * products
