"""Stored programs: what comes back computes the same, bit for bit, and whatever is damaged is refused by name."""

import copy
import json
import math
import operator
import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import library
from toy_programs import affine, counter, node_of

from accelc.capture import capture
from accelc.ir import Exactness, PassRecord, Program
from accelc.ir.errors import ProgramFormatError, describe
from accelc.ir.operators import FUNCTIONS, resolve, target_name
from accelc.ir.program import store
from accelc.ir.serial import dump, dumps, load, loads
from accelc.ir.serial_values import MAX_DEPTH, decode, encode
from accelc.ir.shapes import propagate
from accelc.pipeline import prefill_pipeline, step_pipeline

aten = torch.ops.aten


def through_bytes(program: Program) -> Program:
    return loads(dumps(program), program.tensors())


def sizes_program() -> Program:
    """x [B, 4] -> x in half precision as [B * 4 // 2, 2] plus infinity where it is positive: every kind of argument."""
    root, graph = torch.nn.Module(), fx.Graph()
    store(root, "blocks.0.scale", torch.tensor(2.0))
    x = graph.placeholder("x")
    batch = graph.call_function(aten.sym_size.int, (x, 0))
    rows = graph.call_function(operator.floordiv, (graph.call_function(operator.mul, (batch, 4)), 2))
    scaled = graph.call_function(aten.mul.Tensor, (x, graph.get_attr("blocks.0.scale")))
    folded = graph.call_function(aten.reshape.default, (scaled, [rows, 2]))
    half = graph.call_function(
        aten._to_copy.default, (folded,), {"dtype": torch.float16, "memory_format": torch.contiguous_format}
    )
    full = graph.call_function(
        aten.full.default, ([rows, 2], math.inf), {"dtype": torch.float16, "device": torch.device("cpu")}
    )
    positive = graph.call_function(aten.gt.Scalar, (half, 0))
    chosen = graph.call_function(aten.where.self, (positive, full, half))
    parts = graph.call_function(aten.split.Tensor, (chosen, 1, 1))
    first = graph.call_function(operator.getitem, (parts, 0))
    first.meta["nn_module_stack"] = {"a": ("model.blocks.0", "Block")}
    first.meta["forward"] = "getitem_7"
    graph.output((first, half))
    return Program("sizes", fx.GraphModule(root, graph), ("x",), ("first", "half"))


@pytest.mark.parametrize("build", [affine, sizes_program])
def test_round_trip_computes_the_same(build) -> None:
    program = build()
    loaded = through_bytes(program)
    x = torch.randn(3, 4)
    for want, got in zip(program.run(x), loaded.run(x), strict=True):
        assert want.dtype == got.dtype
        assert torch.equal(want, got)
    assert dumps(loaded) == dumps(program)


def test_state_is_updated_the_same() -> None:
    program = counter()
    loaded = through_bytes(program)
    assert loaded.states == program.states
    rows, lengths = torch.randn(2, 3, 2), torch.tensor([0, 4])
    one, two = torch.zeros(2, 8, 2), torch.zeros(2, 8, 2)
    assert torch.equal(program.run(rows, lengths, one)[0], loaded.run(rows, lengths, two)[0])
    assert torch.equal(one, two)
    assert two.any()


def test_names_origins_and_history_are_kept() -> None:
    @dataclass(frozen=True)
    class Choice:
        of: object
        bytes: int

    record = PassRecord(
        "shrink", {"by": 2, "kind": Exactness.LOSSY, "of": (1, 2.5)}, 3, 0.25, Exactness.LOSSY, ("one",)
    )
    program = replace(
        sizes_program(),
        history=(record,),
        exactness=Exactness.LOSSY,
        facts={"capture": {"length": 7, "rate": 0.5}, "cut": [Choice(torch.nn.Identity(), 4)], "call": object()},
    )
    loaded = through_bytes(program)
    assert [describe(n) for n in loaded.graph.nodes] == [describe(n) for n in program.graph.nodes]
    assert node_of(loaded, operator.getitem).meta["forward"] == "getitem_7"
    assert loaded.exactness is Exactness.LOSSY
    assert loaded.history == (replace(record, options={"by": 2, "kind": "lossy", "of": (1, 2.5)}),)
    assert loaded.facts == {
        "capture": {"length": 7, "rate": 0.5},
        "cut": [{"of": "Identity()", "bytes": 4}],
        "call": "<object object>",
    }


def test_loaded_programs_share_tensors() -> None:
    program = affine()
    loaded = through_bytes(program)
    program.tensors()["layer.weight"].zero_()
    assert not loaded.tensors()["layer.weight"].any()


@pytest.fixture(scope="module")
def derived() -> tuple[Program, Program]:
    forward = capture(library.build("llama"), max_length=32)
    step = step_pipeline().run(forward)
    return step, prefill_pipeline().run(step)


def test_a_derived_step_runs_bit_for_bit(derived: tuple[Program, Program]) -> None:
    for program in derived:
        loaded = through_bytes(program)
        propagate(loaded)
        values = {"tokens": torch.randint(97, (2, 3)), "positions": torch.arange(3).expand(2, 3)}
        values |= {"lengths": torch.zeros(2, dtype=torch.int64), "last": torch.tensor([1, 2])}
        runs = []
        for one in (program, loaded):
            states = [spec.allocate(2, 8) for spec in one.states]
            runs.append([*one.run(*(values[n] for n in one.inputs), *states), *states])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        assert [n.meta["val"].dtype for n in loaded.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        assert str(loaded) == str(program)
        assert dumps(loaded) == dumps(program)


# -- values ------------------------------------------------------------------------------------------------------------

GRAPH = fx.Graph()
NODES = {name: GRAPH.placeholder(name) for name in ("a", "b_1", "c")}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.sampled_from([torch.float32, torch.bool, torch.bfloat16, torch.strided, torch.channels_last]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:3"), torch.device("meta")]),
    st.sampled_from(sorted(NODES.values(), key=str)),
    st.builds(slice, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), st.none()),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


def spelled(value: object) -> object:
    """A value with its types, so that 1, 1.0 and True, or lists and tuples, differ, and nan equals nan."""
    if isinstance(value, list | tuple):
        return type(value).__name__, [spelled(v) for v in value]
    if isinstance(value, dict):
        return "dict", [(k, spelled(v)) for k, v in value.items()]
    return type(value).__name__, repr(value)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_values_round_trip(value: object) -> None:
    stored = json.loads(json.dumps(encode(value), allow_nan=False))
    assert spelled(decode(stored, NODES)) == spelled(value)


@pytest.mark.parametrize("value", [torch.zeros(1), object(), {1: 2}, 1 << 64, {"a": {3}}])
def test_values_without_a_stored_form_are_refused(value: object) -> None:
    with pytest.raises(ProgramFormatError, match="no stored form"):
        encode(value)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"node": "d"}, "no node before its use"),
        ({"eval": "1"}, "unknown tag 'eval'"),
        ({"node": "a", "dict": []}, "is no value"),
        ({"dtype": "Tensor"}, "is no dtype"),
        ({"device": "cpu'"}, "is no device"),
        ({"device": "abacus"}, "is no device"),
        ({"float": "1e5"}, "non-finite"),
        ({"complex": [1, 2]}, "complex"),
        ({"slice": [1, 2]}, "slice items"),
        ({"slice": ["a", None, None]}, "is no slice"),
        ({"dict": [["k", 1], ["k", 2]]}, "twice"),
        ({"tuple": {}}, "tuple items"),
        (math.nan, "is no value"),
        (1 << 70, "is no value"),
    ],
)
def test_damaged_values_are_refused(stored: object, message: str) -> None:
    with pytest.raises(ProgramFormatError, match=message):
        decode(stored, NODES)


def test_nesting_is_bounded_both_ways() -> None:
    deep: object = 1
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    for function in (encode, lambda v: decode(v, NODES)):
        with pytest.raises(ProgramFormatError, match="nested deeper"):
            function(deep)
        function(deep[0])  # type: ignore[index]


# -- operators ---------------------------------------------------------------------------------------------------------


def test_every_function_and_overload_resolves_to_itself() -> None:
    targets = [f for f, _ in FUNCTIONS.values()]
    targets += [aten.add.Tensor, aten.__and__.Tensor, torch.ops.accelc.attention.default, aten.sym_size.int]
    assert all(resolve(target_name(t)) is t for t in targets)


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "builtins.eval", "operator.attrgetter", "operator.methodcaller", "aten.add", "aten.add.Tensor.x",
        "aten.add.__call__", "aten.no_such.default", "aten.from_file.default", "load_library.a.b", "prims.add.default",
        "__class__.mro.x", "",
    ],
)  # fmt: skip
def test_nothing_else_can_be_named(name: str) -> None:
    with pytest.raises(ProgramFormatError):
        resolve(name)


def test_other_namespaces_are_admitted_on_request() -> None:
    assert resolve("prims.neg.default", None) is torch.ops.prims.neg.default


def test_targets_without_a_name_are_refused_when_stored() -> None:
    program = affine()
    node_of(program, aten.add.Tensor).target = torch.add
    with pytest.raises(ProgramFormatError, match="no stored form"):
        dump(program)


# -- damaged programs --------------------------------------------------------------------------------------------------


def edit(path: str, value: object):
    """A change of the entry at a dotted path; without value, its removal."""

    def apply(data):
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
        for part in parents:
            data = data[part]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return apply


STATE = {"name": "x", "shape": ["B", "S"], "dtype": "float32", "time_dim": 1, "origin": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("format", "accelc.program/9"), "is not accelc.program/1"),
        (edit("extra", 1), "unknown key 'extra'"),
        (edit("states", ...), "states missing"),
        (edit("inputs", "x"), "inputs is 'x', not a list"),
        (edit("inputs", [1]), "not all strings"),
        (edit("inputs", ["y"]), "not a well-formed program"),
        (edit("exactness", "perfect"), "is no exactness"),
        (edit("nodes", []), "no nodes"),
        (edit("nodes/3", ...), "before its use"),
        (edit("nodes/4", ...), "output must be the last node"),
        (edit("nodes/3/name", "x"), "taken"),
        (edit("nodes/3/name", "a; import os"), "no identifier"),
        (edit("nodes/3/name", "lambda"), "no identifier"),
        (edit("nodes/3/op", "call_method"), "not allowed"),
        (edit("nodes/3/target", "os.system"), "no operator that a program may call"),
        (edit("nodes/3/target", "aten.nothing.Tensor"), "no operator aten.nothing.Tensor is registered"),
        (edit("nodes/3/target", "operator.neg"), "takes 1 arguments"),
        (edit("nodes/3/target", "aten.relu.default"), "do not fit"),
        (edit("nodes/3/args", [{"node": "mm_default"}]), "do not fit"),
        (edit("nodes/3/args", ...), "call_function with"),
        (edit("nodes/3/args/0", {"node": "output"}), "no node before its use"),
        (edit("nodes/3/kwargs", {"x=1, **__import__": 1}), "no identifier"),
        (edit("nodes/3/kwargs", {"beta": 1}), "do not fit"),
        (edit("nodes/0/target", "x, y=print()"), "no identifier"),
        (edit("nodes/1/target", "layer.bias"), "read but not described"),
        (edit("tensors", {}), "read but not described"),
        (edit("tensors/layer.weight/shape", [4, 5]), r"is torch.float32 \[4, 4\], expected"),
        (edit("tensors/layer.weight/dtype", "float16"), "expected"),
        (edit("tensors/other", {"dtype": "float32", "shape": []}), "the tensor is missing"),
        (edit("tensors/__class__.x", {"dtype": "float32", "shape": []}), "attribute of every module"),
        (edit("tensors/forward", {"dtype": "float32", "shape": []}), "attribute of every module"),
        (edit('tensors/a"b', {"dtype": "float32", "shape": []}), "no identifier"),
        (edit("tensors/layer", {"dtype": "float32", "shape": []}), "that of a module"),
        (edit("facts", {"tuple": []}), "no dictionary"),
        (edit("history", [3]), "is no object"),
        (edit("states", [STATE | {"shape": ["B", "S", -1]}]), "no size"),
        (edit("states", [STATE | {"time_dim": 2}]), "time dim"),
        (edit("states", [STATE | {"dtype": "f"}]), "no dtype"),
    ],
)
def test_damaged_programs_are_refused(change, message: str) -> None:
    program = affine()
    data = json.loads(dumps(program))
    change(data)
    with pytest.raises(ProgramFormatError, match=message):
        load(data, program.tensors())


def test_writing_to_what_is_no_state_is_refused() -> None:
    program = counter()
    data = json.loads(dumps(program))
    data["states"] = []
    data["inputs"].append("cache")
    with pytest.raises(ProgramFormatError, match="not a state"):
        load(data, {})


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": ' + b"9" * 10_000 + b"}", b"[1]"],
)
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(ProgramFormatError):
        loads(text, {})


def test_truncation_at_every_byte_is_noticed() -> None:
    program = affine()
    text = dumps(program)
    for length in range(len(text)):
        with pytest.raises(ProgramFormatError):
            loads(text[:length], program.tensors())


def test_random_damage_loads_or_is_refused_by_name() -> None:
    """Without checksums some edits give another valid program; none may raise anything but the format's own error."""
    chance = random.Random(0)
    program = sizes_program()
    original = json.loads(dumps(program))
    scraps = [None, 0, -1, 2.5, "", "x", "aten.add.Tensor", [], {}, {"node": "x"}, {"tuple": []}, [[[]]], {"a": 1}]
    refused = 0
    for _ in range(400):
        data = copy.deepcopy(original)
        place = data
        while True:
            key = chance.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if not place[key] or not isinstance(place[key], dict | list) or chance.random() < 0.2:
                break
            place = place[key]
        if chance.random() < 0.3:
            del place[key]
        else:
            place[key] = copy.deepcopy(chance.choice(scraps))
        try:
            load(data, program.tensors())
        except ProgramFormatError:
            refused += 1
    assert refused > 200
