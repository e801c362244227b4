"""Steps of every family with the GPU's attention and cache kernels, interpreted, against the dialect's references."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from codegen_gpu import interpreted_launches
from families import FAMILIES, sampled
from torch import Tensor

from accelc.capture import capture
from accelc.codegen.gpu import attention, attention_kernels, cache, cache_kernels
from accelc.codegen.gpu.attention import attention_gpu
from accelc.codegen.gpu.cache import cache_update_gpu, takes
from accelc.ir import Program
from accelc.pipeline import step_pipeline, verify_pipeline
from accelc.runtime.speculation.trees import Tree

CAPACITY = 64
LENGTHS = (17, 3)
TREE = Tree.of_paths([(0,), (1,), (0, 0), (1, 0), (0, 0, 0)])


_interpreted = interpreted_launches((attention_kernels, attention), (cache_kernels, cache))


def with_kernels(program: Program) -> tuple[Program, int]:
    """The program with calls of the kernels' launchers, and how many."""
    made, count = program.clone(), 0
    replaced = {
        torch.ops.accelc.attention.default: attention_gpu,
        torch.ops.accelc.cache_update.default: cache_update_gpu,
    }
    for node in made.graph.nodes:
        if node.target in replaced:
            node.target = replaced[node.target]
            count += 1
    made.module.recompile()
    return made, count


def inputs(program: Program, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    lengths = torch.tensor(LENGTHS)
    layout = TREE.layout() if "tree" in program.inputs else None
    depths = torch.arange(n)[None] if layout is None else layout.depths
    given = {
        "tokens": torch.randint(3, 60, (len(LENGTHS), n), generator=g),
        "positions": lengths[:, None] + depths,
        "lengths": lengths,
        **({} if layout is None else {"tree": layout.words.expand(len(LENGTHS), -1, -1).contiguous()}),
    }
    states = [
        torch.randn(s.sizes(len(LENGTHS), CAPACITY), generator=g).to(s.dtype) if s.dtype.is_floating_point
        else torch.ones(s.sizes(len(LENGTHS), CAPACITY), dtype=s.dtype)
        for s in program.states
    ]  # fmt: skip
    return [*(given[name] for name in program.inputs), *states]


@pytest.mark.parametrize("family", sampled())
def test_steps_with_kernels(family: str) -> None:
    step = step_pipeline().run(capture(FAMILIES[family].build(), max_length=48))
    verify = verify_pipeline().run(step)
    for program, n in ((step, 1), (step, 6), (verify, TREE.size)):
        kernels, count = with_kernels(program)
        given = inputs(program, n)
        mine = [tensor.clone() for tensor in given]
        expected, got = program.run(*given), fx.Interpreter(kernels.module).run(*mine)
        assert count, "nothing is replaced"
        assert all(takes(state, spec.time_dim) for state, spec in zip(given[len(program.inputs) :], program.states))
        scale = float(expected[0].abs().max())
        torch.testing.assert_close(got[0], expected[0], atol=2e-5 * scale, rtol=1e-4)
        for one, other in zip(mine, given, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
