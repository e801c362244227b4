"""The torch.compile backend against eager: results, writes, aliasing, options, errors; tiny modules, C++ is slow."""

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import accelc
import accelc.backend as backend
from accelc.backend import GraphReport
from accelc.ir import Exactness, Program
from accelc.ir.errors import BackendError
from accelc.passes import Pass, PassResult
from accelc.passes.derive_step import DeriveStep

aten = torch.ops.aten
GPTQ = accelc.QuantizeWeights(method="gptq", calibration=accelc.Calibration(torch.zeros(2, 8, dtype=torch.int64)))
Failed = torch._dynamo.exc.BackendCompilerFailed


@pytest.fixture(autouse=True)
def _own_compiler() -> Iterator[None]:
    """Nothing compiled by another test; passes run although an earlier run filled torch's cache of whole graphs."""
    torch.compiler.reset()
    backend.clear_reports()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


def compiled(model: Callable, **options: object) -> Callable:
    """`model` compiled by the backend, whole: a graph break would be an error."""
    return torch.compile(model, backend="accelc", fullgraph=True, options=options)


class Mlp(nn.Module):
    """Two linear layers with a normalised gate between them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 16), nn.Linear(8, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(a) * b)


# -- the same as eager -----------------------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.body[1].running_mean.uniform_()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Nested(nn.Module):
    """No parameters; nested outputs with a size, a constant, None, an input, and views of it."""

    def forward(self, x: Tensor, pair: tuple[Tensor, dict[str, Tensor]]) -> dict[str, object]:
        a, more = pair
        top = (x @ a).topk(2)
        return {"sum": [x + more["b"], x.shape[0]], "none": None, "same": x, "view": x[1:], "top": top, "n": 3}


CASES = {
    "mlp": (Mlp(), lambda: (torch.randn(3, 8),)),
    "bfloat16": (Mlp().bfloat16(), lambda: (torch.randn(3, 8).bfloat16(),)),
    "convolution": (Conv(), lambda: (torch.randn(2, 3, 8, 8),)),
    "nested": (Nested(), lambda: (torch.randn(3, 4), (torch.randn(4, 5), {"b": torch.randn(4)}))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_computes_what_it_does_in_eager(name: str) -> None:
    module, make = CASES[name]
    module = copy.deepcopy(module).eval()
    with torch.no_grad():
        run = compiled(module)
        for _ in range(2):
            inputs = make()
            result, expected = run(*inputs), module(*inputs)
            # Fused code keeps in float32 what eager rounds to bfloat16 after each operation.
            close = {"atol": 2e-2, "rtol": 2e-2} if name == "bfloat16" else {}
            torch.testing.assert_close(result, expected, **close)
    assert [r.kind for r in backend.reports()] == ["inference"]
    assert "normalise" in [record.name for record in backend.last_report().history]


def test_autocast_and_gradient_modes() -> None:
    module = Mlp().eval().requires_grad_(False)
    run, x = compiled(module), torch.randn(3, 8)
    expected = module(x)
    torch.testing.assert_close(run(x), expected)  # gradients enabled, but nothing requires them
    with torch.inference_mode():
        torch.testing.assert_close(run(x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = run(x)
        torch.testing.assert_close(result, module(x), atol=2e-2, rtol=2e-2)
        assert result.dtype == module(x).dtype
        assert result.dtype != module.up(x).dtype  # autocast was on: x + bfloat16 is float32, the layer is not
    assert {r.kind for r in backend.reports()} == {"inference"}


class Writer(nn.Module):
    """Writes to a buffer, to an input, and to a slice of another input as a static cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor, cache: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.add_(1)
        x.mul_(2)
        cache.index_copy_(1, at, x[:, None])
        return cache.sum(1) + self.calls, x, cache[:, 1:]


@pytest.mark.parametrize("freeze", [False, True])
def test_writes_to_inputs_and_buffers_arrive(freeze: bool) -> None:
    module = Writer()
    eager, run = copy.deepcopy(module), compiled(module, freeze=freeze)
    cache, eager_cache = torch.zeros(3, 4, 2), torch.zeros(3, 4, 2)
    with torch.no_grad():
        for step in range(3):
            x = torch.randn(3, 2)
            mine, theirs, at = x.clone(), x.clone(), torch.tensor([step])
            torch.testing.assert_close(run(mine, cache, at), eager(theirs, eager_cache, at))
            torch.testing.assert_close((mine, cache, module.calls), (theirs, eager_cache, eager.calls))
    assert module.calls.tolist() == [3, 3]


class ReturnsWhatItWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        self.last.copy_(x * 2)
        cache.add_(x)
        return cache[1:], cache, self.last, self.last + 1


def test_what_is_written_may_be_returned() -> None:
    module = ReturnsWhatItWrites()
    eager, run = copy.deepcopy(module), compiled(module)
    cache, eager_cache = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(3)
            results, expected = run(x, cache), eager(x, eager_cache)
            torch.testing.assert_close((results, cache), (expected, eager_cache))
            assert results[1] is cache
            assert results[2] is module.last


def test_a_compiled_forward_generates_with_a_static_cache() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=31,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(2, 31, (2, 5))
    given = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **given)
    model.forward = torch.compile(model.forward, backend="accelc")
    assert torch.equal(model.generate(ids, cache_implementation="static", **given), expected)


def test_outputs_keep_their_memory_and_strides() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        return x.clone(), x.t().contiguous(), y + 1, y + 1, y.t(), x.sin().t().clone(), x.mul_(3).clone()

    run = compiled(function)
    x = torch.randn(2, 3)
    given, eager_given = x.clone(), x.clone()
    with torch.no_grad():
        results, expected = run(given), function(eager_given)
    torch.testing.assert_close(results, expected)
    assert [r.stride() for r in results] == [e.stride() for e in expected]
    assert backend.last_report().history[0].matches > 0  # the pass did drop clones and merge equal calls
    before = [r.clone() for r in results]
    given.zero_()  # no result is the input,
    torch.testing.assert_close(list(results), before)
    results[2].zero_()  # and none is another one
    torch.testing.assert_close(results[3], before[3])


def test_random_numbers_are_drawn_once_a_call() -> None:
    run = compiled(lambda x: (torch.rand_like(x), torch.rand_like(x)))
    with torch.no_grad():
        a, b = run(torch.ones(64))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("how", ["mark", "dynamic"])
def test_dynamic_shapes_compile_once(how: str) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, int, Tensor]:
        x = x.flatten(1)
        return (x @ w).softmax(-1), x.shape[0] * 2, x.new_ones(x.shape[0])

    run = torch.compile(function, backend="accelc", fullgraph=True, dynamic=True if how == "dynamic" else None)
    w = torch.randn(6, 6)
    with torch.no_grad():
        for step, n in enumerate((5, 3, 17)):
            x = torch.randn(n, 2, 3)
            if how == "mark":
                torch._dynamo.mark_dynamic(x, 0)
            if step == 0:
                torch.testing.assert_close(run(x, w), function(x, w))
            else:
                with torch.compiler.set_stance("fail_on_recompile"):
                    torch.testing.assert_close(run(x, w), function(x, w))
    assert len(backend.reports()) == 1


def test_graph_breaks_give_several_reports() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    x = torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, backend="accelc")(x), function(x))
    assert [r.nodes for r in backend.reports()] == [1, 1]


def test_control_flow_is_left_to_inductor_and_the_report_says_why() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    run = compiled(function)
    with torch.no_grad():
        for x in (torch.ones(3), -torch.ones(3)):
            torch.testing.assert_close(run(x), function(x))
    assert backend.last_report().history == ()
    assert "calls another graph" in backend.last_report().note


def test_an_assertion_in_the_graph_survives() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.sum().item()
        torch._check(n > 0)
        return x + 1, torch.ones(n)

    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = compiled(function)
        torch.testing.assert_close(run(torch.ones(3, dtype=torch.int64)), function(torch.ones(3, dtype=torch.int64)))
        with pytest.raises(RuntimeError):
            run(-torch.ones(3, dtype=torch.int64))
    assert "called for its effect" in backend.last_report().note


def test_dialect_operations_become_fused_code() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.accelc.rms_norm(x, w, 1e-6, 0.0) * 2

    x, w = torch.randn(3, 8), torch.randn(8)
    run = compiled(function)
    with torch.no_grad():
        expected = nn.functional.rms_norm(x, (8,), w, 1e-6) * 2
        torch.testing.assert_close(run(x, w), expected)
        with torch.profiler.profile() as profile:
            run(x, w)
    called = {event.key for event in profile.key_averages()}
    assert not [name for name in called if "rms_norm" in name], called


@pytest.mark.parametrize("dynamic", [False, True])
def test_norms_raised_from_frozen_weights_become_fused_code(dynamic: bool) -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rms, self.linear = nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.rms(self.layer(x)))

    model = Norms().eval()
    nn.init.normal_(model.layer.weight)
    run = torch.compile(model, backend="accelc", dynamic=dynamic, options={"passes": ["raise_norms"], "freeze": True})
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
        with torch.profiler.profile() as profile:
            torch.testing.assert_close(run(x * 2), run(x * 2))
    (report,) = backend.reports()
    assert report.note == ""
    assert report.history[-1].name == "raise_norms"
    assert report.history[-1].matches == 2
    assert not [event.key for event in profile.key_averages() if "norm" in event.key]


def test_transformers_generates_with_a_static_cache() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=31, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(2, 31, (2, 5))
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **given)
    how = transformers.CompileConfig(backend="accelc", mode=None, options={})
    how._compile_all_devices = True  # transformers compiles on accelerators only unless told so
    given = {**given, "cache_implementation": "static", "compile_config": how}
    assert torch.equal(model.generate(ids, **given), expected)
    assert backend.reports()
    assert all(r.kind == "inference" and r.history for r in backend.reports())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(model.generate(ids, **given), expected)


# -- training --------------------------------------------------------------------------------------------------------


def test_training_gives_eager_gradients_and_is_announced_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_announced", set())
    caplog.set_level(logging.WARNING, logger="accelc")
    for module in (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)):
        eager = copy.deepcopy(module)
        x = torch.randn(3, 4)
        compiled(module)(x).square().mean().backward()
        eager(x).square().mean().backward()
        for mine, theirs in zip(module.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    assert [(r.kind, r.history) for r in backend.reports()] == [("training", ())] * 2
    assert [record.getMessage() for record in caplog.records] == [f"accelc: {backend.TRAINING_NOTICE}"]


# -- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift(Pass):
    """Adds `by` behind every relu: a wrong function, so that the test sees that the pass ran."""

    name = "test.shift"
    after = ("normalise",)
    exactness = Exactness.LOSSY
    by: float = 1.0

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        found = [n for n in program.graph.nodes if n.target is aten.relu.default]
        for node in found:
            with program.graph.inserting_after(node):
                new = program.graph.call_function(aten.add.Tensor, (node, self.by))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        return PassResult(program, len(found))


def test_passes_are_added_disabled_and_reported() -> None:
    x = torch.randn(3)
    seen: list[GraphReport] = []
    for by in (1.0, 2.0):  # torch's caches are on: what one run compiled must not serve the other
        torch.compiler.reset()
        with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=True):
            run = compiled(lambda x: x.relu(), passes=[Shift(by)], disable=["normalise"], report=seen.append)
            torch.testing.assert_close(run(x), x.relu() + by)
    assert len(seen) == 2
    assert backend.last_report() is seen[-1]
    assert {r.name: (r.matches, r.notes) for r in seen[-1].history} == {
        "normalise": (0, ("disabled",)),
        "test.shift": (1, ()),
    }
    assert "test.shift(by=2.0): 1 matches" in str(seen[-1])


def test_a_pass_that_matches_nothing_in_one_graph_is_no_error() -> None:
    with torch.no_grad():
        compiled(lambda x: x.sin(), passes=[Shift()])(torch.ones(2))
    assert [r.matches for r in backend.last_report().history if r.name == "test.shift"] == [0]


def test_frozen_parameters_give_the_same_and_are_guarded() -> None:
    module = Conv().eval()
    eager = copy.deepcopy(module)
    run = compiled(module, freeze=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(x), eager(x))
        assert backend.last_report().frozen >= 6  # two of the convolution, four of the norm
        module.body[0].weight.mul_(2)
        with pytest.raises(BackendError, match=r"weight.*was written to[\s\S]*torch.compiler.reset"):
            run(x)


def test_a_buffer_that_the_graph_writes_is_not_frozen() -> None:
    module = nn.BatchNorm1d(4)  # in training mode, without gradients
    eager = copy.deepcopy(module)
    run = compiled(module, freeze=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 4)
            torch.testing.assert_close(run(x), eager(x))
            torch.testing.assert_close(list(module.buffers()), list(eager.buffers()))
    assert backend.last_report().frozen == 2


def test_layers_that_share_a_graph_do_not_share_frozen_weights() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    run = compiled(lambda layer, x: layer(x), freeze=True)
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(run(first, x), first(x))
        try:
            result = run(second, x)
        except BackendError:
            return
        torch.testing.assert_close(result, second(x))  # dynamo told them apart by itself


def test_freezing_needs_gradients_off_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_announced", set())
    module, x = nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4)
    torch.testing.assert_close(compiled(module, freeze=True)(x), module(x))
    assert backend.last_report().frozen == 0
    assert "no_grad" in caplog.text


def test_options_of_inductor_reach_it() -> None:
    with torch.no_grad():
        x = torch.randn(4)
        result = compiled(lambda x: nn.functional.dropout(x, 0.5), inductor={"fallback_random": True})
        torch.manual_seed(3)
        mine = result(x)
        torch.manual_seed(3)
        torch.testing.assert_close(mine, nn.functional.dropout(x, 0.5))  # eager's generator, only with that option


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"mode": "max-autotune"}, [r"mode='max-autotune'", r"CompileConfig\(backend=\"accelc\", mode=None"]),
        (
            {"options": {"frieze": 1, "x": 2}},
            ["UnknownOptionError", "no option frieze, x", "disable, freeze, inductor"],
        ),
        (
            {"options": {"freeze": 1, "disable": "normalise"}},
            ["freeze=1", "disable='normalise'", "a list of pass names"],
        ),
        ({"options": {"passes": ["normalize"]}}, ["no pass is named 'normalize'", "normalise"]),
        ({"options": {"disable": ["nothing"]}}, ["cannot disable nothing"]),
        (
            {"options": {"passes": ["raise_norms", "derive_step", "last_logits"]}},
            ["OptionValueError", "cannot run derive_step, last_logits", r"any graph: .*raise_norms", "accelc.compile"],
        ),
        ({"options": {"passes": [DeriveStep()]}}, ["cannot run derive_step"]),
        ({"options": {"quantize": GPTQ}}, ["cannot run the method 'gptq'", "accelc.compile", "rtn, hqq"]),
        ({"options": {"passes": [GPTQ]}}, ["cannot run the method 'gptq'"]),
        ({"options": {"passes": ["quantize_weights"], "quantize": "int8"}}, ["both quantize the weights"]),
        ({"options": {"disable": ["quantize_weights"], "quantize": "int8"}}, ["is asked for and disabled"]),
        ({"options": {"quantize": accelc.QuantizeWeights(consume=True)}}, ["consume=True frees"]),
        ({"options": {"inductor": {"max_autotun": True}}}, ["no option max_autotun", "Close to it: .*max_autotune"]),
    ],
)
def test_wrong_use_is_named_and_remedied(given: dict[str, object], wanted: list[str]) -> None:
    run = torch.compile(lambda x: x + 1, backend="accelc", **given)
    with pytest.raises(Failed) as caught:
        run(torch.ones(2))
    for text in wanted:
        caught.match(text)


def test_the_entry_point_needs_no_import() -> None:
    program = """
import sys, torch
assert "accelc" not in sys.modules
run = torch.compile(lambda x: x.relu() + 1, backend="accelc")
with torch.no_grad():
    assert run(torch.tensor([-1.0, 2.0])).tolist() == [1.0, 3.0]
assert sys.modules["accelc.backend"].last_report().kind == "inference"
assert "accelc" in torch.compiler.list_backends()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
