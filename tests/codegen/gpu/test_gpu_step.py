"""The lowering of a step of one token for GPUs, run on CPUs: the graph that the compiler gets computes the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.fx as fx
from families import FAMILIES
from torch import Tensor

from accelc.capture import capture
from accelc.codegen.gpu.step import GpuStep, expanded
from accelc.compiler import one_token
from accelc.ir import Program
from accelc.ir.dialect import REFERENCES
from accelc.pipeline import step_pipeline

CAPACITY = 64


def derived(family: str) -> Program:
    return step_pipeline().run(capture(FAMILIES[family].build(), max_length=32))


def inputs(step: Program, batch: int, n: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    lengths = torch.tensor([5, 9, 1][:batch])
    states = [
        torch.randn(s.sizes(batch, CAPACITY), generator=g).to(s.dtype) if s.dtype.is_floating_point
        else torch.ones(s.sizes(batch, CAPACITY), dtype=s.dtype)
        for s in step.states
    ]  # fmt: skip
    tokens = torch.randint(3, 60, (batch, n), generator=g)
    return [tokens, lengths[:, None] + torch.arange(n), lengths, *states]


def traced(module: fx.GraphModule) -> Any:
    """The compiler's front half: traced, functionalized, run by torch's own operations."""
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "bloom", "deepseek_v3", "gpt_oss")),
    ],
)
def test_the_compiled_form_computes_and_writes_the_same(family: str) -> None:
    torch.compiler.reset()
    step = derived(family)
    compiled = GpuStep(step, step.run, traced)
    for batch in (1, 3):
        given = inputs(step, batch)
        mine = [tensor.clone() for tensor in given]
        with torch.inference_mode():
            expected, got = step.run(*given), compiled(*mine)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        for one, other in zip(mine, given, strict=True):
            assert torch.equal(one, other)
    assert not compiled.notice


def test_operations_without_kernels_are_written_out_and_tensors_shared() -> None:
    step = derived("llama")
    made = expanded(step)
    targets = {node.target for node in made.graph.nodes if node.op == "call_function"}
    assert targets & set(REFERENCES) == {torch.ops.accelc.attention.default}
    assert torch.ops.accelc.cache_update.default in targets
    tensors = step.tensors()
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        assert tensor.data_ptr() == tensors[name].data_ptr()


def test_several_tokens_and_what_does_not_compile_run_node_by_node(caplog: pytest.LogCaptureFixture) -> None:
    step = derived("llama")
    calls = []

    def broken(module: fx.GraphModule) -> Any:
        def run(*_: Tensor) -> Any:
            calls.append(1)
            raise RuntimeError("no such instruction\nand a long trace")

        return run

    compiled = GpuStep(step, step.run, broken)
    with torch.inference_mode():
        many = inputs(step, 2, 5)
        torch.testing.assert_close(compiled(*many)[0], step.run(*many)[0])
        assert not calls
        for _ in range(2):
            one = inputs(step, 2)
            torch.testing.assert_close(compiled(*one)[0], step.run(*one)[0])
    assert len(calls) == 1
    assert compiled.notice.endswith("RuntimeError: no such instruction")
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_examples_fit_the_step() -> None:
    step = derived("llama")
    states = [spec.allocate(1, CAPACITY, torch.device("cpu")) for spec in step.states]
    assert step.run(*one_token(step), *states)[0].shape[:2] == (1, 1)


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    torch.compiler.reset()
    step = derived("llama")
    compiled = GpuStep(step, step.run)
    given = inputs(step, 2)
    mine = [tensor.clone() for tensor in given]
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*mine)[0], step.run(*given)[0], atol=1e-4, rtol=1e-4)
    assert not compiled.notice
