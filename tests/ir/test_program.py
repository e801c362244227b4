"""Every invariant of a program is broken once, and `check` has to notice."""

import operator
from dataclasses import replace

import pytest
import torch
from toy_programs import affine, counter, node_of

from accelc.ir import Exactness, PassRecord, StateSpec, check
from accelc.ir.errors import InvariantError, around, describe

aten = torch.ops.aten


def test_well_formed_programs_pass() -> None:
    check(affine())
    check(counter())


def test_graph_must_lint() -> None:
    program = affine()
    node = node_of(program, aten.add.Tensor)
    product = node.args[0]
    node.append(product)  # now used before it is defined
    with pytest.raises(InvariantError, match="does not lint"):
        check(program)


def test_only_four_kinds_of_nodes() -> None:
    program = affine()
    node = node_of(program, aten.add.Tensor)
    with program.graph.inserting_before(node):
        node.args = (program.graph.call_method("relu", (node.args[0],)), 1)
    with pytest.raises(InvariantError, match=r"call_method nodes are not allowed[\s\S]*->.*relu"):
        check(program)


def test_placeholders_are_inputs_then_states() -> None:
    with pytest.raises(InvariantError, match="expected"):
        check(replace(affine(), inputs=("tokens",)))
    program = counter()
    with pytest.raises(InvariantError, match="expected"):
        check(replace(program, inputs=("lengths", "rows")))


def test_names_are_unique() -> None:
    program = counter()
    rows, lengths, _ = program.placeholders()
    lengths.target = rows.target
    with pytest.raises(InvariantError, match="unique names"):
        check(replace(program, inputs=("rows", "rows")))


def test_output_is_a_tuple_with_one_node_per_name() -> None:
    program = affine()
    with pytest.raises(InvariantError, match="tuple of 2"):
        check(replace(program, outputs=("y", "z")))
    output = program.graph.output_node()
    output.args = (output.args[0][0],)
    with pytest.raises(InvariantError, match="tuple of 1"):
        check(program)


def test_output_entries_are_nodes() -> None:
    program = affine()
    program.graph.output_node().args = ((1.0,),)
    with pytest.raises(InvariantError, match="is not a node"):
        check(program)


def test_output_names_are_unique() -> None:
    program = affine()
    output = program.graph.output_node()
    output.args = (output.args[0] * 2,)
    with pytest.raises(InvariantError, match="unique"):
        check(replace(program, outputs=("y", "y")))


def test_calls_are_operator_overloads() -> None:
    program = affine()
    node = node_of(program, aten.add.Tensor)
    for target in (torch.add, operator.add):  # on tensors, both; `operator.add` is for sizes
        node.target = target
        with pytest.raises(InvariantError, match="not an operator overload"):
            check(program)


def test_attributes_are_tensors_with_data() -> None:
    program = affine()
    program.module.layer.weight = torch.empty(4, 4, device="meta")
    with pytest.raises(InvariantError, match="not a tensor with data"):
        check(program)
    del program.module.layer.weight
    with pytest.raises(InvariantError, match="nonexistent attribute weight"):
        check(program)


def test_only_states_are_mutated() -> None:
    program = affine()
    node_of(program, aten.add.Tensor).target = aten.add_.Tensor
    with pytest.raises(InvariantError, match="mutates mm_default, which is not a state"):
        check(program)


def test_a_view_of_a_state_may_not_be_mutated() -> None:
    program = counter()
    update = node_of(program, torch.ops.accelc.cache_update.default)
    with program.graph.inserting_before(update):
        view = program.graph.call_function(aten.alias.default, (update.args[0],))
    update.args = (view, *update.args[1:])
    with pytest.raises(InvariantError, match="which is not a state"):
        check(program)


def test_every_state_is_written() -> None:
    program = counter()
    program.graph.erase_node(node_of(program, torch.ops.accelc.cache_update.default))
    with pytest.raises(InvariantError, match="never written"):
        check(program)


@pytest.mark.parametrize("shape", [("S", "B", 2), ("B", 8, 2), ("B", "S", "N"), (2, "S", 2)])
def test_shapes_of_states(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(InvariantError, match="state cache has shape"):
        check(replace(counter(), states=(StateSpec("cache", shape, torch.float32, time_dim=1),)))


def test_clone_shares_tensors_and_nothing_else() -> None:
    program = affine()
    program.facts["a"] = 1
    copy = program.clone()
    assert copy.tensors()["layer.weight"].data_ptr() == program.tensors()["layer.weight"].data_ptr()
    x = torch.randn(2, 4)
    expected = x @ program.tensors()["layer.weight"] + 1
    node = node_of(copy, aten.add.Tensor)
    node.args = (node.args[0], 5)
    node.meta["mark"] = True
    copy.facts["b"] = 2
    torch.testing.assert_close(program.run(x)[0], expected)
    torch.testing.assert_close(copy.run(x)[0], expected + 4)
    assert "mark" not in node_of(program, aten.add.Tensor).meta
    assert program.facts == {"a": 1}


def test_clone_keeps_names_and_values() -> None:
    program = counter()
    copy = program.clone()
    assert [n.name for n in copy.graph.nodes] == [n.name for n in program.graph.nodes]
    assert [n.meta.get("val") is None for n in copy.graph.nodes] == [
        n.meta.get("val") is None for n in program.graph.nodes
    ]
    assert copy.output_node("total").target is aten.sum.dim_IntList
    check(copy)


def test_run_writes_the_states() -> None:
    cache = torch.zeros(2, 8, 2)
    rows = torch.randn(2, 3, 2)
    (total,) = counter().run(rows, torch.tensor([1, 4]), cache)
    expected = torch.zeros(2, 8, 2)
    expected[0, 1:4], expected[1, 4:7] = rows[0], rows[1]
    assert torch.equal(cache, expected)
    torch.testing.assert_close(total, rows.sum(1))


def test_listing_and_errors_show_shapes() -> None:
    program = affine()
    program.history = (PassRecord("fold", {"deep": True}, 3, 0.5, Exactness.EXACT, ("a note",)),)
    text = program.listing()
    assert "program affine(x) -> y  [exact]" in text
    assert "fold(deep=True): 3 matches, 500 ms, exact\n    a note" in text
    node = node_of(program, aten.mm.default)
    node.meta["nn_module_stack"] = {"k": ("layers.0", "Linear")}
    assert "# [3, 4] float32  (layers.0)" in describe(node)
    assert [line[4:6] for line in around(program.graph, node).splitlines()].count("->") == 1


def test_state_arithmetic() -> None:
    state = StateSpec("k", ("B", 2, "S", 16), torch.bfloat16, time_dim=2)
    assert state.bytes_per_token() == 2 * 16 * 2
    allocated = state.allocate(3, 10)
    assert allocated.shape == (3, 2, 10, 16)
    assert allocated.dtype is torch.bfloat16
    assert not allocated.any()


def test_exactness_composes_to_the_weakest() -> None:
    assert Exactness.compose() is Exactness.EXACT
    assert Exactness.compose(Exactness.EXACT, Exactness.DISTRIBUTION) is Exactness.DISTRIBUTION
    assert Exactness.compose(Exactness.LOSSY, Exactness.DISTRIBUTION) is Exactness.LOSSY
    assert str(Exactness.LOSSY) == "lossy"
