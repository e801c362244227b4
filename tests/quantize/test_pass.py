"""QuantizeWeights on whole programs: what it replaces, what it leaves, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES

from accelc.capture import capture
from accelc.ir import Exactness, Program
from accelc.ir.errors import ExactnessError, InputError, OptionValueError
from accelc.ir.quantized import Scheme
from accelc.passes import Pipeline
from accelc.passes.last_logits import LastLogits
from accelc.passes.quantize.rounding import round_to_nearest
from accelc.passes.quantize_weights import QuantizeWeights
from accelc.pipeline import step_pipeline

LINEAR = torch.ops.accelc.quantized_linear.default


def derived(family: str) -> tuple[Program, torch.nn.Module]:
    model = FAMILIES[family].build()
    return step_pipeline().run(capture(model, max_length=32)), model


def logits(program: Program) -> torch.Tensor:
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    states = [s.allocate(2, 16) for s in program.states]
    return program.run(tokens, torch.arange(7).expand(2, 7), torch.zeros(2, dtype=torch.int64), *states)[0]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "qwen3", "deepseek_v3"])
def test_the_program_computes_with_the_dequantized_weights(family: str) -> None:
    """The same as the float program of a model whose weights were rounded beforehand."""
    step, model = derived(family)
    one = QuantizeWeights(scheme="int8:g32", head="int8")
    made = Pipeline([one]).run(step)
    assert made.exactness is Exactness.LOSSY
    calls = [n for n in made.graph.nodes if n.target is LINEAR]
    assert len(calls) == made.history[-1].matches > 4
    parameters, tensors = dict(model.named_parameters(remove_duplicate=False)), made.tensors()
    with torch.no_grad():
        for name in {str(n.args[1].target).removesuffix(".quantized.codes") for n in calls}:
            by_row = tensors[f"{name}.quantized.scales"].shape[-2] == 1
            weight = parameters[f"{name}.weight"]
            weight.copy_(round_to_nearest(weight, Scheme.parse("int8" if by_row else "int8:g32")).dequantize())
    torch.testing.assert_close(logits(made), logits(step), atol=2e-4, rtol=2e-4)  # `step` shares the model's weights


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


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"include": "*no_such*"}, OptionValueError, "matches no weight"),
        ({"scheme": "int5"}, InputError, "int4"),
        ({"method": "magic"}, OptionValueError, "hqq"),
    ],
)
def test_bad_options_name_the_choices(options: dict[str, str], error: type[Exception], text: str) -> None:
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


def test_a_guarantee_refuses_it() -> None:
    step, _ = derived("llama")
    with pytest.raises(ExactnessError, match="quantize_weights"):
        Pipeline([QuantizeWeights()]).run(step, require=Exactness.EXACT)
