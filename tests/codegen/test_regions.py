"""Operations without kernels: by calls of torch, or compiled by Inductor where there are many; never a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import fx

from accelc.codegen import CompiledStep, Options, regions

aten = torch.ops.aten


def program(operations: int, wide: int = 1) -> fx.GraphModule:
    """A chain of sines over x [B, N], repeated `wide` times along a dim that is a size times a number."""
    graph = fx.Graph()
    x, y = graph.placeholder("tokens"), graph.placeholder("lengths")
    rows = graph.call_function(aten.sym_size.int, (y, 0))
    many = graph.call_function(lambda a, b: a * b, (rows, wide))
    column = graph.call_function(aten.unsqueeze.default, (x, 2))
    value = graph.call_function(aten.expand.default, (column, [-1, -1, many]))
    for _ in range(operations):
        value = graph.call_function(aten.sin.default, (value,))
    graph.output((graph.call_function(aten.mul.Tensor, (value, 2.0)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def inputs(batch: int, tokens: int) -> list[torch.Tensor]:
    return [torch.randn(batch, tokens), torch.zeros(batch)]


DIMS = {"tokens": {0: "B", 1: "N"}, "lengths": {0: "B"}}


def test_few_operations_are_calls_of_torch() -> None:
    gm = program(3)
    step = CompiledStep(gm, inputs(2, 3), DIMS, Options())
    assert step.report.operations == {"native": 1, "eager": 3, "inductor": 0}
    for sizes in ((2, 3), (1, 1), (4, 5)):
        given = inputs(*sizes)
        torch.testing.assert_close(step(*given), step.interpret(*given))


def test_many_operations_go_to_inductor_at_every_size() -> None:
    """Among the sizes of the region is 256 B, and no input of it has B: the sizes are inputs themselves."""
    gm = program(5, wide=256)
    step = CompiledStep(gm, inputs(2, 3), DIMS, Options(fuse=5))
    assert step.report.operations == {"native": 1, "eager": 0, "inductor": 5}
    assert not step.report.notices
    misses = step.report.cache_misses
    for sizes in ((2, 3), (3, 2), (4, 5)):
        given = inputs(*sizes)
        torch.testing.assert_close(step(*given), step.interpret(*given))
    assert step.report.cache_misses == misses  # one artifact serves all


@pytest.mark.parametrize("error", [AssertionError("vr must not be None for symbol s44"), RuntimeError("s44 not in {}")])
def test_a_failure_of_inductor_leaves_the_region_to_torch(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(regions, "save_inductor_artifact", fail)
    step = CompiledStep(program(5), inputs(2, 3), DIMS, Options(fuse=5))
    assert step.report.operations == {"native": 1, "eager": 5, "inductor": 0}
    (notice,) = step.report.notices
    assert "sin" in notice
    assert str(error) in notice
    given = inputs(4, 5)
    torch.testing.assert_close(step(*given), step.interpret(*given))
    assert len(step.report.notices) == 1


def test_inductor_is_not_imported_without_need() -> None:
    code = (
        "import sys, torch\n"
        "sys.path.insert(0, 'tests/codegen')\n"
        "from test_regions import DIMS, Options, CompiledStep, inputs, program\n"
        "CompiledStep(program(3), inputs(2, 3), DIMS, Options())(*inputs(2, 3))\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
