"""QuantizeWeights on whole programs: what it replaces, what it leaves, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from accelc.capture import capture
from accelc.ir import Exactness, Program
from accelc.ir.dialect import QUANTIZED
from accelc.ir.errors import ExactnessError, InputError, OptionValueError
from accelc.ir.quantized import QuantizedWeight, Scheme
from accelc.ir.quantized_ops import quantized_linear_reference
from accelc.ir.rounding import round_to_nearest
from accelc.passes import Pipeline
from accelc.passes.last_logits import LastLogits
from accelc.passes.quantize import calibration
from accelc.passes.quantize.calibration import Calibration, Rows, run_calibrated
from accelc.passes.quantize.norm_scaling import scale_norms
from accelc.passes.quantize.products import Matrix, Product, find_matrices
from accelc.passes.quantize.rewrite import stem
from accelc.passes.quantize_weights import QuantizeWeights
from accelc.pipeline import step_pipeline

LINEAR = torch.ops.accelc.quantized_linear.default
GROUPED = torch.ops.accelc.quantized_grouped_linear.default


def derived(family: str) -> tuple[Program, torch.nn.Module]:
    model = FAMILIES[family].build()
    return step_pipeline().run(capture(model, max_length=32)), model


def logits(program: Program, tokens: torch.Tensor | None = None) -> torch.Tensor:
    if tokens is None:
        tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    batch, length = tokens.shape
    states = [s.allocate(batch, length + 9) for s in program.states]
    positions = torch.arange(length).expand(batch, length)
    inputs = (tokens, positions, torch.zeros(batch, dtype=torch.int64), *states)
    with torch.no_grad():
        return Exact(program.module).run(*inputs)[0]  # type: ignore[no-any-return]


class Exact(torch.fx.Interpreter):
    """Runs operations on quantized weights by their references; kernels round the inputs of products."""

    def call_function(self, target, args, kwargs):
        if target is GROUPED:
            return quantized_grouped_linear_by(quantized_linear_reference, *args)
        return super().call_function(QUANTIZED.get(target, target), args, kwargs)


def quantized_grouped_linear_by(product, x, codes, scales, zeros, ends, bits, rows) -> torch.Tensor:
    parts, begin = [], 0
    for expert, end in enumerate([*ends.tolist()]):
        own = None if zeros is None else zeros[expert]
        parts.append(product(x[begin:end], codes[expert], scales[expert], own, None, bits, rows))
        begin = end
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2", "mixtral", "gpt_oss", "llama4_text"])
def test_the_program_computes_with_the_dequantized_weights(family: str) -> None:
    """The same as the float program of a model whose weights were rounded beforehand."""
    step, model = derived(family)
    made = Pipeline([QuantizeWeights(scheme="int8:g32", head="int8:g32")]).run(step)
    assert made.exactness is Exactness.LOSSY
    calls = [n for n in made.graph.nodes if n.target in (LINEAR, GROUPED)]
    assert len(calls) == made.history[-1].matches > 4
    floats = {name: t for name, t in made.tensors().items() if t.dim() > 1 and t.is_floating_point()}
    assert not [n for n in floats if "proj" in n and "quantized" not in n and "bias" not in n], floats.keys()
    stored, tensors = dict(model.named_parameters(remove_duplicate=False)), made.tensors()
    with torch.no_grad():
        for path, matrix in find_matrices(step).items():
            if f"{stem(path)}.codes" in tensors:
                values = stored[path].transpose(-1, -2) if matrix.turned else stored[path]
                values.copy_(round_to_nearest(values.clone(), Scheme.parse("int8:g32")).dequantize())
    torch.testing.assert_close(logits(made), logits(step), atol=2e-4, rtol=2e-4)  # `step` shares the model's weights
    if family in ("mixtral", "gpt_oss"):
        assert_routers_stay(step, made, 2)


def test_routers_stay_floats() -> None:
    step, _ = derived("qwen2_moe")
    assert_routers_stay(step, Pipeline([QuantizeWeights()]).run(step), 2)


def assert_routers_stay(step: Program, made: Program, count: int) -> None:
    """The matrices that choose experts are as they were."""
    routers = [path for path, matrix in find_matrices(step).items() if matrix.router]
    assert len(routers) == count
    assert set(routers) <= set(made.tensors())
    assert any("routers stay floats" in note for note in made.history[-1].notes) == bool(count)


def test_tied_embeddings_read_the_codes_and_the_floats_are_gone() -> None:
    step, _ = derived("llama_tied")
    made = Pipeline([QuantizeWeights()]).run(step)
    targets = [n.target for n in made.graph.nodes]
    assert torch.ops.accelc.quantized_embedding.default in targets
    assert torch.ops.aten.embedding.default not in targets
    assert not any(t.dim() == 2 and t.is_floating_point() and t.numel() > 4096 for t in made.tensors().values())
    size = lambda p: sum(t.numel() * t.element_size() for t in p.tensors().values())  # noqa: E731
    assert size(made) < 0.6 * size(step)


def test_prefill_still_chooses_before_the_projection() -> None:
    step, _ = derived("llama")
    prefill = Pipeline([LastLogits()]).run(Pipeline([QuantizeWeights()]).run(step))
    nodes = [n.target for n in prefill.graph.nodes]
    assert nodes.index(torch.ops.aten.index.Tensor) < max(i for i, t in enumerate(nodes) if t is LINEAR)


def test_include_and_exclude_choose_by_name() -> None:
    step, _ = derived("llama")
    everything = Pipeline([QuantizeWeights()]).run(step).history[-1].matches
    some = Pipeline([QuantizeWeights(include="*mlp*", exclude="*down_proj*")]).run(step)
    assert 0 < some.history[-1].matches < everything
    assert all("gate" in str(n.args[1].target) or "up" in str(n.args[1].target)
               for n in some.graph.nodes if n.target is LINEAR)  # fmt: skip


def test_untied_embeddings_on_request_and_overrides_by_name() -> None:
    step, _ = derived("llama")
    made = Pipeline([QuantizeWeights(embeddings="int8", overrides="*k_proj*=int8:g64, *layers.1.*=none")]).run(step)
    tensors = made.tensors()
    assert "model.embed_tokens.quantized.codes" in tensors
    words = {n: tensors[f"model.layers.0.self_attn.{n}_proj.quantized.codes"].shape[-2] for n in "qk"}
    assert words["k"] == 64 // 4  # 64 columns of 8 bits
    assert words["q"] == 128 // 8  # padded to a group of 128, of 4 bits
    assert "model.layers.1.mlp.up_proj.weight" in tensors


def test_groups_are_chosen_within_the_bits_of_128() -> None:
    config = LlamaConfig(vocab_size=97, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::40] *= 30
    step = step_pipeline().run(capture(model, max_length=32))
    fixed = Pipeline([QuantizeWeights(scheme="int4:g128", head="none")]).run(step)
    made = Pipeline([QuantizeWeights(scheme="int4:auto", head="none")]).run(step)
    size = lambda p: sum(t.numel() * t.element_size() for n, t in p.tensors().items() if "quantized" in n)  # noqa: E731
    assert size(made) <= size(fixed)
    groups = lambda n: made.tensors()[f"model.layers.{n}.mlp.up_proj.quantized.scales"].shape[-2]  # noqa: E731
    assert groups(0) > groups(1)


def test_consuming_frees_the_floats_and_leaves_the_result_alone() -> None:
    step, model = derived("llama")
    expected = logits(Pipeline([QuantizeWeights()]).run(step))
    made = Pipeline([QuantizeWeights(consume=True)]).run(step)
    assert torch.equal(logits(made), expected)
    assert model.model.layers[0].mlp.up_proj.weight.untyped_storage().nbytes() == 0
    assert model.model.embed_tokens.weight.untyped_storage().nbytes() > 0


def calibrated_case(family: str) -> tuple[Program, Calibration]:
    """A step whose norms give a few strong columns, which calibrated methods see and rounding does not."""
    model = FAMILIES[family].build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and ("norm" in name or "ln_" in name):
                parameter[::9] += 7
    text = Calibration(torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(1)))
    return step_pipeline().run(capture(model, max_length=32)), text


def test_consuming_frees_what_awq_scaled() -> None:
    step, text = calibrated_case("llama")
    weights = {name: tensor for name, tensor in step.tensors().items() if name.endswith("up_proj.weight")}
    awq = QuantizeWeights(method="awq", calibration=text)
    expected = logits(Pipeline([awq]).run(step))
    assert torch.equal(logits(Pipeline([replace(awq, consume=True)]).run(step)), expected)
    assert weights
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in weights.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "llama4_text"])
def test_pieces_of_the_text_are_as_all_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters each product, after products with the weights that were made before; sorted by expert or not."""
    step, text = calibrated_case(family)
    matrices = {path: m for path, m in find_matrices(step).items() if m.products and not m.router}
    found: dict[int, dict[str, list[torch.Tensor]]] = {}
    for most in (32, 100, 10_000):
        monkeypatch.setattr(calibration, "PIECE", most)
        seen = found.setdefault(most, {})

        def made(matrix: Matrix, product: Product, pieces: Sequence[Rows], seen=seen) -> QuantizedWeight:
            experts = range(1 if pieces[0].ends is None else len(matrix.weight(step)))
            by_expert = [[p.x if p.ends is None else p.of_expert(expert) for p in pieces] for expert in experts]
            seen[matrix.path] = [torch.cat(rows) for rows in by_expert]
            return round_to_nearest(matrix.weight(step), Scheme.parse("int8:g32"))

        run_calibrated(step, matrices, text, made)
        assert seen.keys() == matrices.keys()
    for most in (32, 100):
        for path, experts in found[10_000].items():
            for expected, got in zip(experts, found[most][path], strict=True):
                assert got.shape == expected.shape
                moments = [rows.double().T @ rows.double() for rows in (got, expected)]  # an expert's come in any order
                torch.testing.assert_close(*moments, atol=1e-4 * float(moments[1].abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_gptq_loses_less_on_its_text(family: str) -> None:
    step, text = calibrated_case(family)
    losses = {}
    for method in ("rtn", "gptq"):
        one = QuantizeWeights(scheme="int4:g64", head="none", method=method, calibration=text)
        made = Pipeline([one]).run(step)
        losses[method] = float((logits(made, text.tokens) - logits(step, text.tokens)).square().mean())
    assert losses["gptq"] < 0.9 * losses["rtn"], losses


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_scales_move_from_norms_to_weights_and_change_nothing_but_the_rounding(family: str) -> None:
    step, text = calibrated_case(family)
    scaled = step.clone()
    matrices = find_matrices(scaled)
    schemes = dict.fromkeys((path for path, m in matrices.items() if m.products), Scheme.parse("int4:g64"))
    note = scale_norms(scaled, {path: matrices[path] for path in schemes}, schemes, text)
    assert float(re.search(r"error is ([0-9.]+) of", note)[1]) < 0.9
    moved = [path for path in schemes if not torch.equal(scaled.tensors()[path], step.tensors()[path])]
    assert len(moved) >= 4
    torch.testing.assert_close(logits(scaled, text.tokens), logits(step, text.tokens), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "gptq"}, OptionValueError, "calibration"),
        ({"overrides": "*q_proj*"}, OptionValueError, "pattern=scheme"),
        ({"overrides": "*q_pro=int8"}, OptionValueError, "matches no weight"),
        ({"overrides": "*q_proj*=int5"}, InputError, "unknown quantization scheme 'int5'"),
        ({"overrides": "*q_proj*=int8", "exclude": "*q_proj*"}, OptionValueError, "leave out"),
        ({"scheme": "int4:g32:g64"}, InputError, "its group twice"),
        ({"scheme": "int4:sym:asym"}, InputError, "its symmetry twice"),
        ({"scheme": "int8:row:fp16:bf16"}, InputError, "its dtype of scales twice"),
        ({"include": "*no_such*"}, OptionValueError, "matches no weight"),
        ({"scheme": "int5"}, InputError, r"int4:auto lets .* none leaves"),
        ({"scheme": "int4:auto:g32"}, InputError, "its group twice"),
        ({"scheme": "int4:auto:auto"}, InputError, "its group twice"),
        ({"consume": "yes"}, OptionValueError, "consume is 'yes'"),
        ({"method": "gptq", "calibration": torch.zeros(2, 8, dtype=torch.int64)}, InputError, "Calibration.of_text"),
        ({"calibration": [1, 2, 3]}, InputError, "Calibration.of_text"),
        ({"method": "magic"}, OptionValueError, "hqq"),
    ],
)
def test_bad_options_name_the_choices(options: dict[str, Any], error: type[Exception], text: str) -> None:
    step, _ = derived("llama")
    with pytest.raises(error, match=text):
        Pipeline([QuantizeWeights(**options)]).run(step)


def test_weights_that_are_no_numbers_are_named() -> None:
    model = FAMILIES["llama"].build()
    step = step_pipeline().run(capture(model, max_length=32))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        Pipeline([QuantizeWeights()]).run(step)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_too_large_for_the_dtype_of_scales_are_named(method: str) -> None:
    step, model = derived("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e8
    text = Calibration(torch.randint(3, 90, (2, 8)))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is too large for scales in float16"):
        Pipeline([QuantizeWeights("int4:fp16", method=method, calibration=text)]).run(step)
    Pipeline([QuantizeWeights("int4", method=method, calibration=text)]).run(step)
    with pytest.raises(InputError, match="too large"):
        Pipeline([QuantizeWeights("int4:fp16", consume=True)]).run(step)
    assert all(p.untyped_storage().nbytes() for p in model.parameters())


def test_inputs_that_are_no_numbers_on_the_text_are_named() -> None:
    step, model = derived("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    text = Calibration(torch.full((2, 8), 7))
    with pytest.raises(InputError, match=r"what enters the product with .*layers\.0\.self_attn"):
        Pipeline([QuantizeWeights("int4", method="gptq", calibration=text)]).run(step)


def test_a_product_of_a_product_reads_the_new_one() -> None:
    """One is replaced before the other, which must not go on reading what was there."""
    torch.manual_seed(0)
    model = Factors().eval()
    step = step_pipeline().run(capture(model, max_length=32))
    made = Pipeline([QuantizeWeights("int8:g32")]).run(step)
    assert made.history[-1].matches == 3
    assert float((logits(made) - logits(step)).abs().max()) < 0.05


class Factors(torch.nn.Module):
    """Logits by a weight of low rank, as the product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(97, 64)
        self.second = torch.nn.Linear(32, 64)
        self.first = torch.nn.Linear(64, 32)
        self.head = torch.nn.Linear(64, 97)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.embed(tokens))))  # type: ignore[no-any-return]


class Otherwise(torch.nn.Module):
    """A weight that is multiplied in two ways, and one with a neighbour called as its codes would be."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(97, 64)
        self.w, self.both = (torch.nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2))
        self.w_quantized = torch.nn.Parameter(torch.randn(64, 64) / 8)
        self.head = torch.nn.Linear(64, 97)
        self.head.register_buffer("quantized", torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) @ self.both @ self.both.T
        x = torch.nn.functional.linear(torch.nn.functional.linear(x, self.w), self.w_quantized)
        return self.head(x) + self.head.quantized  # type: ignore[no-any-return, operator]


def test_names_that_are_taken_and_weights_that_are_read_otherwise() -> None:
    torch.manual_seed(0)
    step = step_pipeline().run(capture(Otherwise().eval(), max_length=32))
    made = Pipeline([QuantizeWeights("int8:g32")]).run(step)
    assert made.history[-1].matches == 3
    assert "1 weights stay floats, as not only products as they lie read them: both" in made.history[-1].notes
    assert float((logits(made) - logits(step)).abs().max()) < 0.05


def test_a_head_is_int8_with_int4_and_as_the_rest_otherwise() -> None:
    step, _ = derived("llama")
    for scheme, head in (("int4:g32", "int8:row"), ("int8:g32", "int8:g32"), ("none", "none")):
        made = Pipeline([QuantizeWeights(scheme, overrides="*q_proj*=int8")]).run(step)
        assert (f"head lm_head.weight: {head}" in made.history[-1].notes) is (head != "none")


def test_a_guarantee_refuses_it() -> None:
    step, _ = derived("llama")
    with pytest.raises(ExactnessError, match="quantize_weights"):
        Pipeline([QuantizeWeights()]).run(step, require=Exactness.EXACT)
