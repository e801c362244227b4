"""Programs on disk: a hit computes what was stored, and anything damaged, stale or half-written is a miss."""

import dataclasses
import logging
import multiprocessing
import os
import random
import time

import pytest
import torch
import torch.fx as fx
from models import library
from torch import Tensor, nn
from toy_programs import aten

from accelc import program_cache
from accelc.capture import capture
from accelc.ir import Program
from accelc.ir.errors import InputError
from accelc.ir.program import store
from accelc.pipeline import prefill_pipeline, step_pipeline
from accelc.program_cache import directory, evict, fingerprint, folded_parameters, load_programs, store_programs

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path))


class Small(nn.Module):
    """A projection with a learned offset by position, the offset being a function of a parameter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(7, 4, generator=generator))
        self.offset = nn.Parameter(torch.randn(8, 4, generator=generator))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))


def program_of(model: Small, table: Tensor) -> Program:
    """tokens [B, N] -> embed[tokens] * scale + table[0], and the transpose of embed's first half: a view."""
    root, graph = nn.Module(), fx.Graph()
    for path, tensor in (
        ("embed", model.embed), ("scale", model.scale), ("accelc_tables.t", table), ("part", model.embed[:3].t()),
    ):  # fmt: skip
        store(root, path, tensor)
    tokens = graph.placeholder("tokens")
    rows = graph.call_function(aten.embedding.default, (graph.get_attr("embed"), tokens))
    rows = graph.call_function(aten.mul.Tensor, (rows, graph.get_attr("scale")))
    first = graph.call_function(aten.select.int, (graph.get_attr("accelc_tables.t"), 0, 0))
    rows = graph.call_function(aten.add.Tensor, (rows, first))
    graph.output((rows, graph.call_function(aten.matmul.default, (rows, graph.get_attr("part")))))
    return Program("step", fx.GraphModule(root, graph), ("tokens",), ("rows", "products"))


def forward_of(model: Small) -> Program:
    """tokens -> embed[tokens] * scale + (2 * offset)[0]: what `program_of` would have been derived from."""
    root, graph = nn.Module(), fx.Graph()
    for path in ("embed", "scale", "offset"):
        store(root, path, getattr(model, path))
    tokens = graph.placeholder("tokens")
    rows = graph.call_function(aten.embedding.default, (graph.get_attr("embed"), tokens))
    rows = graph.call_function(aten.mul.Tensor, (rows, graph.get_attr("scale")))
    first = graph.call_function(aten.mul.Tensor, (graph.get_attr("offset"), 2))
    first = graph.call_function(aten.select.int, (first, 0, 0))
    graph.output((graph.call_function(aten.add.Tensor, (rows, first)),))
    return Program("forward", fx.GraphModule(root, graph), ("tokens",), ("logits",))


def store_small(model: Small, key: str = KEY, **options: int) -> Program:
    program = program_of(model, model.offset.detach() * 2)
    assert store_programs(key, {"step": program}, model, ["offset"], **options)
    return program


TOKENS = torch.tensor([[1, 0, 6]])


def test_a_hit_computes_the_same_and_shares_the_weights() -> None:
    model = Small()
    program = store_small(model)
    loaded = load_programs(KEY, model)
    assert loaded is not None
    assert list(loaded) == ["step"]
    for want, got in zip(program.run(TOKENS), loaded["step"].run(TOKENS), strict=True):
        assert torch.equal(want, got)
    tensors = loaded["step"].tensors()
    assert tensors["part"].stride() == (1, 4)
    for path in ("embed", "part", "scale"):
        own = getattr(model, path, model.embed)
        assert tensors[path].untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


def test_weights_are_those_of_the_model_that_loads() -> None:
    store_small(Small())
    other = Small()
    with torch.no_grad():
        other.embed.add_(1)  # not folded: any value will do
    loaded = load_programs(KEY, other)
    assert loaded is not None
    want = program_of(other, other.offset.detach() * 2).run(TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(want, loaded["step"].run(TOKENS), strict=True))


def test_other_values_of_a_folded_parameter_are_no_hit() -> None:
    model, other = Small(0), Small(1)
    store_small(model)
    assert load_programs(KEY, other) is None
    assert load_programs(KEY, model) is not None  # the entry is sound and stays
    store_small(other)
    assert load_programs(KEY, other) is not None
    assert load_programs(KEY, model) is None


def test_folded_parameters_are_found_even_when_they_are_still_read() -> None:
    model = Small()
    forward = forward_of(model)
    assert folded_parameters({"forward": forward}, forward) == {"offset"}
    assert folded_parameters({"step": program_of(model, model.offset.detach())}, forward) == {"offset"}


def test_nothing_stored_is_a_quiet_miss(caplog: pytest.LogCaptureFixture) -> None:
    assert load_programs(KEY, Small()) is None
    assert not caplog.records


def test_keys_cannot_leave_the_cache() -> None:
    for key in ("../../x", "", "a/b", "ABCDEF0123"):
        with pytest.raises(InputError):
            load_programs(key, Small())


def test_a_flipped_byte_anywhere_is_a_miss_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(0)
    model = Small()
    store_small(model)
    names = sorted(f.name for f in (directory() / KEY).iterdir())
    assert names == ["0.json", "manifest", "tables.safetensors"]
    for name in names * 12:
        store_small(model)
        file = directory() / KEY / name
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        caplog.clear()
        assert load_programs(KEY, model) is None
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "damaged" in caplog.text
        assert not (directory() / KEY).exists()
        assert load_programs(KEY, model) is None
        assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["0.json", "manifest", "tables.safetensors"])
def test_missing_and_truncated_files_are_misses(name: str) -> None:
    model = Small()
    for damage in (os.unlink, lambda file: os.truncate(file, 10), lambda file: os.truncate(file, 0)):
        store_small(model)
        damage(directory() / KEY / name)
        assert load_programs(KEY, model) is None
        assert not (directory() / KEY).exists()


def test_programs_of_another_model_are_refused() -> None:
    model = Small()
    store_small(model)
    model.embed = nn.Parameter(torch.zeros(9, 4))
    assert load_programs(KEY, model) is None


def test_large_tables_are_not_stored(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(program_cache, "MAX_TABLES", 8 * 4 * 4 - 1)
    model = Small()
    program = program_of(model, model.offset.detach() * 2)
    assert not store_programs(KEY, {"step": program}, model, ["offset"])
    assert "are not cached" in caplog.text
    monkeypatch.setattr(program_cache, "MAX_TABLES", 8 * 4 * 4)
    store_small(model)


def test_a_cache_that_cannot_be_written_is_a_notice(tmp_path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path / "file"))
    model = Small()
    program = program_of(model, model.offset.detach() * 2)
    assert not store_programs(KEY, {"step": program}, model, ["offset"])
    assert "are not cached" in caplog.text
    assert load_programs(KEY, model) is None


def test_the_least_recently_used_entries_go_first() -> None:
    model = Small()
    keys = [f"{i:08x}" for i in range(4)]
    for age, key in enumerate(keys):
        store_small(model, key)
        os.utime(directory() / key / "manifest", (1000 + age, 1000 + age))
    size = sum(f.stat().st_size for f in (directory() / keys[0]).iterdir())
    assert load_programs(keys[0], model) is not None  # used again
    evict(2 * size + size // 2)
    assert sorted(f.name for f in directory().iterdir()) == [keys[0], keys[3]]
    store_small(model, "ffffffff", limit=size // 2)  # what has just been stored stays
    assert [f.name for f in directory().iterdir()] == ["ffffffff"]


def test_abandoned_folders_are_swept_and_fresh_ones_are_not() -> None:
    store_small(Small())
    for name, age in ((".old", 2 * program_cache.ABANDONED), (".new", 0.0)):
        (directory() / name).mkdir()
        os.utime(directory() / name, (time.time() - age,) * 2)
    evict(program_cache.LIMIT)
    assert sorted(f.name for f in directory().iterdir()) == [".new", KEY]


def store_and_load(folder: str, rounds: int, results) -> None:
    """What each of several processes does at once."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    logging.disable(logging.CRITICAL)
    os.environ["ACCELC_CACHE_DIR"] = folder
    model = Small()
    want = program_of(model, model.offset.detach() * 2).run(TOKENS)
    hits, wrong = 0, 0
    for _ in range(rounds):
        store_small(model)
        loaded = load_programs(KEY, model)
        hits += loaded is not None
        wrong += loaded is not None and not torch.equal(loaded["step"].run(TOKENS)[0], want[0])
    results.put((hits, wrong))


def test_processes_that_store_at_once_do_not_disturb_each_other(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=store_and_load, args=(str(tmp_path), 20, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [(20, 0), (20, 0)]
    assert load_programs(KEY, Small()) is not None
    assert [f.name for f in directory().iterdir()] == [KEY]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_derived_programs_of_a_second_instance_run_identically(family: str) -> None:
    model = library.build(family)
    key = fingerprint(model, max_length=32)
    assert key is not None
    forward = capture(model, max_length=32)
    step = step_pipeline().run(forward)
    programs = {"step": step, "prefill": prefill_pipeline().run(step)}
    assert store_programs(key, programs, model, folded_parameters(programs, forward))

    again = library.build(family)
    assert fingerprint(again, max_length=32) == key
    loaded = load_programs(key, again)
    assert loaded is not None
    values = {"tokens": torch.randint(97, (2, 3)), "positions": torch.arange(3).expand(2, 3)}
    values |= {"lengths": torch.zeros(2, dtype=torch.int64), "last": torch.tensor([1, 2])}
    for name, program in programs.items():
        got = loaded[name]
        assert dataclasses.replace(got, module=program.module, facts={}) == dataclasses.replace(program, facts={})
        states = [[spec.allocate(2, 8) for spec in program.states] for _ in range(2)]
        inputs = [values[n] for n in program.inputs]
        (want,), (result,) = program.run(*inputs, *states[0]), got.run(*inputs, *states[1])
        assert torch.equal(want, result)
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
