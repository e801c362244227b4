"""Normalise: expected graphs for what it removes and for what it must keep, and equality on captured models."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from families import FAMILIES
from torch import Tensor
from toy_programs import add_values, counter, node_of

from accelc.capture import capture
from accelc.ir import Program
from accelc.ir.program import store
from accelc.passes import Pipeline
from accelc.passes.normalise import Normalise

aten = torch.ops.aten


def build(body: Callable[..., object], *examples: Tensor, **tensors: Tensor) -> Program:
    """A program from `body(call, *inputs, **attributes)`, which calls operations and returns the outputs."""
    root, graph = torch.nn.Module(), fx.Graph()
    for name, tensor in tensors.items():
        store(root, name, tensor)
    inputs = tuple(f"x{i}" for i in range(len(examples)))
    placeholders = [graph.placeholder(name) for name in inputs]

    def call(target: object, *args: object, **kwargs: object) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    outputs = body(call, *placeholders, **{n: (lambda n=n: graph.get_attr(n)) for n in tensors})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    graph.output(outputs)
    names = tuple(f"y{i}" for i in range(len(outputs)))
    return add_values(Program("test", fx.GraphModule(root, graph), inputs, names), *examples)


def normalised(program: Program, *inputs: Tensor) -> str:
    """The calls left, one a line, after checking that the outputs are the same."""
    result = Pipeline([Normalise()]).run(program, verify=inputs, tolerance=0.0)
    return "\n".join(line(node) for node in result.graph.nodes if node.op in ("call_function", "output"))


def line(node: fx.Node) -> str:
    kwargs = "".join(f", {k}={v}" for k, v in node.kwargs.items())
    if node.op == "output":
        return f"return {', '.join(map(str, node.args[0]))}"
    return f"{node.name} = {str(node.target).removeprefix('aten.')}({', '.join(map(str, node.args))}{kwargs})"


X = torch.randn(3, 4)
UNTOUCHED = "exp_default = exp.default(x0)\nneg_default = neg.default(exp_default)\nreturn neg_default"


@pytest.mark.parametrize(
    "body",
    [
        lambda call, x: call(aten.alias.default, x),
        lambda call, x: call(aten.detach.default, x),
        lambda call, x: call(aten.lift_fresh_copy.default, x),
        lambda call, x: call(aten.clone.default, x),
        lambda call, x: call(aten.clone.default, x, memory_format=torch.contiguous_format),
        lambda call, x: call(aten._to_copy.default, x, dtype=torch.float32),
        lambda call, x: call(aten.to.dtype, x, torch.float32),
        lambda call, x: call(aten.view.default, x, [3, -1]),
        lambda call, x: call(aten._unsafe_view.default, x, [3, 4]),
        lambda call, x: call(aten.reshape.default, call(aten.view.default, x, [12]), [3, 4]),
        lambda call, x: call(aten.expand.default, x, [3, -1]),
        lambda call, x: call(aten.slice.Tensor, x, 0, 0, 9223372036854775807),
        lambda call, x: call(aten.slice.Tensor, x, 1, 0, 4),
        lambda call, x: call(aten.permute.default, x, [0, -1]),
        lambda call, x: call(aten.dropout.default, x, 0.5, False),
        lambda call, x: call(torch.ops.aten.squeeze.dim, x, 0),
        lambda call, x: call(aten.add.Tensor, x, 0),
        lambda call, x: call(aten.sub.Tensor, x, 0.0),
        lambda call, x: call(aten.mul.Tensor, x, 1.0),
        lambda call, x: call(aten.div.Tensor, x, 1),
    ],
)
def test_changes_nothing(body: Callable[..., fx.Node]) -> None:
    program = build(lambda call, x: call(aten.neg.default, body(call, call(aten.exp.default, x))), X)
    assert normalised(program, X) == UNTOUCHED


def test_dropout_with_a_mask() -> None:
    def body(call, x):
        dropped = call(aten.native_dropout.default, call(aten.exp.default, x), 0.5, False)
        return call(aten.neg.default, call(operator.getitem, dropped, 0))

    assert normalised(build(body, X), X) == UNTOUCHED


@pytest.mark.parametrize(
    "body",
    [
        lambda call, x: call(aten._to_copy.default, x, dtype=torch.float64),
        lambda call, x: call(aten.reshape.default, x, [12]),
        lambda call, x: call(aten.expand.default, call(aten.unsqueeze.default, x, 0), [2, -1, -1]),
        lambda call, x: call(aten.slice.Tensor, x, 0, 1),
        lambda call, x: call(aten.permute.default, x, [1, 0]),
        lambda call, x: call(aten.permute.default, call(aten.mm.default, x, call(aten.t.default, x)), [1, 0]),
        lambda call, x: call(aten.add.Tensor, x, 1),
        lambda call, x: call(aten.mul.Tensor, x, 0),
        lambda call, x: call(aten.add.Tensor, call(aten.gt.Scalar, x, 0), 0),  # bool + int is int
        lambda call, x: call(aten.flip.default, x, [0]),
        lambda call, x: call(aten.transpose.int, call(aten.mm.default, x, call(aten.t.default, x)), 0, 1),
        lambda call, x: call(aten.div.Tensor_mode, x, 1, rounding_mode="floor"),
    ],
)
def test_changes_something(body: Callable[..., fx.Node]) -> None:
    program = build(lambda call, x: body(call, call(aten.exp.default, x)), X)
    before = len(program.graph.nodes)
    normalised(program, X)
    assert len(Normalise().run(program).program.graph.nodes) == before


def test_dropout_in_training_stays() -> None:
    program = build(lambda call, x: call(aten.dropout.default, x, 0.5, True), X)
    assert "dropout" in str(Normalise().run(program).program.graph)


def test_asserts_go_and_take_what_only_they_used() -> None:
    def body(call, x):
        true = call(aten.ones.default, [], dtype=torch.bool)
        token = call(aten._functional_assert_async.msg, true, "a", call(aten.ones.default, []))
        call(aten._assert_tensor_metadata.default, x, None, None, torch.float32)
        call(aten._functional_assert_async.msg, true, "b", token)
        return call(aten.neg.default, x)

    program = build(body, X)
    assert normalised(program, X) == "neg_default = neg.default(x0)\nreturn neg_default"
    assert Normalise().run(program).notes[0] == "3 assert"


def test_one_spelling() -> None:
    def body(call, x):
        a = call(aten.softmax.int, x, dim=-1, dtype=None)
        b = call(aten.clone.default, call(aten.t.default, a), memory_format=torch.contiguous_format)
        return call(aten.view.default, b, [12]), call(aten.sum.dim_IntList, x, [0], keepdim=False, dtype=torch.float64)

    assert normalised(build(body, X), X).splitlines() == [
        "softmax_int = softmax.int(x0, -1)",
        "t_default = t.default(softmax_int)",
        "view_default = reshape.default(t_default, [12])",  # a view would refuse these strides
        "sum_dim_int_list = sum.dim_IntList(x0, [0], dtype=torch.float64)",
        "return view_default, sum_dim_int_list",
    ]


# -- duplicates ------------------------------------------------------------------------------------------------------


def test_equal_calls_are_merged() -> None:
    def body(call, x, weight):
        products = [call(aten.mm.default, call(aten.exp.default, x), weight()) for _ in range(2)]
        return call(aten.add.Tensor, *products)

    program = build(body, X, weight=torch.randn(4, 4))
    assert normalised(program, X).splitlines() == [
        "exp_default = exp.default(x0)",
        "mm_default = mm.default(exp_default, weight)",
        "add_tensor = add.Tensor(mm_default, mm_default)",
        "return add_tensor",
    ]


def test_tied_weights_are_one() -> None:
    tied = torch.randn(4, 4)
    program = build(
        lambda call, x, a, b, c: call(aten.cat.default, [call(aten.mm.default, x, w()) for w in (a, b, c)]),
        X, a=tied, b=tied, c=tied.t(),
    )  # fmt: skip
    result = Pipeline([Normalise()]).run(program, verify=(X,))
    assert [n.target for n in result.graph.nodes if n.op == "get_attr"] == ["a", "c"]


def test_calls_that_only_look_equal_are_kept() -> None:
    def body(call, x):
        scalars = [call(aten.full.default, [2], value) for value in (1, 1.0, True)]
        zeros = [call(aten.copysign.Scalar, x, value) for value in (0.0, -0.0)]
        noise = [call(aten.rand_like.default, x) for _ in range(2)]
        return (*scalars, *zeros, call(aten.sub.Tensor, *noise))

    program = build(body, X)
    result = Normalise().run(program)
    assert result.matches == 0
    assert [str(o.dtype) for o in result.program.run(X)[:3]] == ["torch.int64", "torch.float32", "torch.bool"]
    assert result.program.run(X)[5].any(), "two draws are not one"


def test_states_are_read_again_after_a_write() -> None:
    program = counter()
    update = node_of(program, torch.ops.accelc.cache_update.default)
    graph = program.graph
    with graph.inserting_before(update):
        early = graph.call_function(aten.sum.dim_IntList, (update.args[0], [1]))
        copy = graph.call_function(aten.clone.default, (update.args[0],))
    with graph.inserting_before(graph.output_node()):
        again = graph.call_function(aten.sum.dim_IntList, (update.args[0], [1]))
        old = graph.call_function(aten.sum.dim_IntList, (copy, [1]))
    total = program.output_node("total")
    graph.output_node().args = ((total, *(graph_add(graph, n) for n in (early, again, old))),)
    program.outputs = ("total", "early", "again", "old")
    inputs = torch.randn(2, 3, 2), torch.tensor([1, 4]), torch.randn(2, 8, 2)
    expected = program.run(*(t.clone() for t in inputs))
    assert not torch.allclose(expected[0], expected[1] / 2)
    result = Pipeline([Normalise()]).run(program, verify=inputs, tolerance=0.0)
    assert result.history[0].matches == 1  # `again` is `total`; the clone holds the old rows
    assert len(result.graph.find_nodes(op="call_function", target=aten.clone.default)) == 1


def graph_add(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """node * 2 at the end of the graph, so that it is no output itself."""
    with graph.inserting_before(graph.output_node()):
        return graph.call_function(aten.mul.Tensor, (node, 2))


# -- what outputs share memory with ----------------------------------------------------------------------------------


def test_outputs_do_not_start_to_share_memory() -> None:
    """A caller may write to what it got: inputs and other outputs must not change with it."""

    def body(call, x, y):
        once, twice = call(aten.exp.default, x), call(aten.exp.default, x)
        swapped = call(aten.view.default, call(aten.clone.default, y), [3, 4])
        return once, twice, call(aten.clone.default, once), call(aten.clone.default, x), swapped

    program = build(body, X, X + 1)
    inputs = X.clone(), X + 1
    outputs = Pipeline([Normalise()]).run(program, verify=inputs).run(*inputs)
    addresses = [t.data_ptr() for t in (*inputs, *outputs)]
    assert len(set(addresses)) == len(addresses)


def test_a_copy_of_an_inner_value_may_be_returned_itself() -> None:
    program = build(lambda call, x: call(aten.clone.default, call(aten.exp.default, x)), X)
    assert normalised(program, X) == "exp_default = exp.default(x0)\nreturn exp_default"


# -- captured models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_captured_models(family: str) -> None:
    model = FAMILIES[family].build()
    program = capture(model, max_length=48)
    result = Pipeline([Normalise()]).run(program)
    for shape in ((2, 7), (1, 2), (3, 20)):
        tokens = torch.randint(0, FAMILIES[family].vocabulary, shape)
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(result.run(tokens)[0], expected, atol=1e-5, rtol=1e-5)
    calls = [n for n in result.graph.nodes if n.op == "call_function"]
    gone = ("_assert_tensor_metadata", "alias", "detach", "view", "_unsafe_view", "clone", "lift_fresh_copy", "dropout")
    assert not [n for n in calls if str(n.target).startswith(tuple(f"aten.{name}." for name in gone))]
    assert all("val" in n.meta for n in calls)
    assert any(part in str(n.meta.get("nn_module_stack")) for n in calls for part in ("layers.1", "h.1"))
    sizes = [n.meta["val"].node.expr for n in calls if isinstance(n.meta["val"], torch.SymInt)]
    assert len(sizes) == len(set(sizes))
    ranges = [n for n in calls if n.target is aten.arange.default]
    assert len(ranges) == len({n.args for n in ranges})
    assert Normalise().run(result).matches == 0, "a second run finds nothing left"
