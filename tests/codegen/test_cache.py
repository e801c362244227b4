"""What outlives a process: hits in a second one, damage repaired, a missing compiler named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accelc.codegen import native
from accelc.codegen.cache import cached
from accelc.codegen.errors import CacheDirectoryError
from accelc.ir.compat import load_inductor_artifact

PROGRAM = """
import json, sys, warnings
import torch
from torch import fx
from accelc.codegen import Options, compile_program
graph = fx.Graph()
x, y = graph.placeholder("x"), graph.placeholder("y")
cumulative = graph.call_function(torch.ops.aten.cumsum.default, (x, 1))
raised = graph.call_function(torch.ops.aten.exp2.default, (cumulative,))
graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (raised, y)),))
inputs = [torch.arange(6.0).reshape(2, 3), torch.full((2, 3), 2.0)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step = compile_program(fx.GraphModule(torch.nn.Module(), graph), inputs, options=Options(fuse=1))
ours = [str(w.message) for w in caught if str(w.message).startswith("accelc")]
print(json.dumps([step.report.cache_hits, step.report.cache_misses, step(*inputs)[0].tolist(), ours]))
"""
EXPECTED = [[2.0, 4.0, 16.0], [16.0, 256.0, 8192.0]]


def run(cache: Path, **environment: str) -> list:
    env = {**os.environ, "ACCELC_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"), **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_second_process_builds_nothing_and_damage_is_repaired(tmp_path: Path) -> None:
    built = Path(native.library().kernels._name)  # the kernels, from the cache of the tests
    (tmp_path / "kernels").mkdir()
    kernels = Path(shutil.copy(built, tmp_path / "kernels" / built.name))
    assert run(tmp_path) == [1, 1, EXPECTED, []]  # one region is missing
    assert run(tmp_path) == [2, 0, EXPECTED, []]
    assert not list(tmp_path.rglob("*.tmp"))
    assert list((tmp_path / "kernels").iterdir()) == [kernels]  # those for weights in few bits were not needed
    (region,) = (tmp_path / "regions").iterdir()
    for path, load in ((kernels, native.KERNELS.load), (region, lambda path: load_inductor_artifact(str(path)))):
        good, bad = path.read_bytes(), path.with_suffix(".bad")
        bad.write_bytes(b"not what it should be")
        with pytest.warns(UserWarning, match="rebuilding"):
            _, hit = cached(bad, lambda scratch, good=good: scratch.write_bytes(good), load)
        assert not hit
        assert bad.read_bytes() == good


def test_each_library_is_known_by_its_functions() -> None:
    plain, quantized = (Path(lib._name) for lib in (native.library().kernels, native.quantized_library()))
    for path, load in ((plain, native.QUANTIZED.load), (quantized, native.KERNELS.load)):
        with pytest.raises(ValueError, match="not a kernel library"):
            load(path)


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ToolchainError: (.|\n)*remedy: Install g\+\+"):
        run(tmp_path, CXX="no-such-compiler", PATH="")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheDirectoryError, match="file") as raised:
        cached(tmp_path / "file" / "kernels" / "entry", Path.touch, Path.read_text)
    assert "ACCELC_CACHE_DIR" in raised.value.remedy


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "entry", build, Path.read_text)
    assert not list(tmp_path.iterdir())
    assert cached(tmp_path / "entry", lambda p: p.write_text("whole") and None, Path.read_text) == ("whole", False)
    assert cached(tmp_path / "entry", build, Path.read_text) == ("whole", True)
