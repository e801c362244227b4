"""Normalise: what capture leaves behind is removed, and calls that mean the same read the same."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from accelc.ir import Program
from accelc.ir.program import fetch, mutated_arguments
from accelc.passes.base import Pass, PassResult
from accelc.passes.memory import alias_chain, returned_nodes, written_nodes
from accelc.passes.registry import register_pass

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True)
class Normalise(Pass):
    """Removes asserts, operations that change nothing, duplicates and dead code; every later matcher relies on it.

    * calls are spelled one way: arguments by position, defaults left out, every `view` a `reshape` (so that no result
      depends on strides);
    * gone are asserts, `alias`, `detach`, `dropout` in inference, and copies, casts, views, slices, `+ 0` and `* 1`
      whose result provably has the shape, dtype and device of their input;
    * equal calls of pure operations are one node, equal symbolic sizes too, and tied weights are one `get_attr`.

    Nodes keep their ``meta``. Matches are the nodes removed. Works on forward and on step programs.
    """

    name = "normalise"
    ensures = ("normalised",)
    expected_matches = (0, None)

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        graph = program.graph
        size = len(graph.nodes)
        removed: Counter[str] = Counter()
        _remove_asserts(graph, removed)
        for node in graph.nodes:
            _canonicalise(node)
        _simplify(program, removed)
        before = len(graph.nodes)
        graph.eliminate_dead_code(is_impure_node=_has_effect)
        removed["dead"] += before - len(graph.nodes)
        program.module.recompile()
        notes = tuple(f"{count} {what}" for what, count in sorted(removed.items()) if count)
        return PassResult(program, size - len(graph.nodes), notes)


# -- asserts -------------------------------------------------------------------------------------------------------

ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten._functional_assert_async.msg,
        aten._functional_assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def _remove_asserts(graph: fx.Graph, removed: Counter[str]) -> None:
    for node in reversed(graph.nodes):  # functional asserts feed a token to the next one, so the last goes first
        if node.target in ASSERTS and not node.users:
            graph.erase_node(node)
            removed["assert"] += 1


# -- one spelling ----------------------------------------------------------------------------------------------------

VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
NO_DEFAULT = object()


def _canonicalise(node: fx.Node) -> None:
    """Pass arguments by position, leave out those that have their default value, and spell views as `reshape`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    if node.target in VIEWS:
        node.target = aten.reshape.default
    arguments = node.target._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(a.name, _default(a)) for i, a in enumerate(positional)
    ]
    while values and _is_default(positional[len(values) - 1], values[-1]):
        values.pop()
    if any(value is NO_DEFAULT for value in values):
        return  # malformed; `check` reports it better
    node.args = tuple(values)
    node.kwargs = {
        a.name: node.kwargs[a.name]
        for a in arguments
        if a.kwarg_only and a.name in node.kwargs and not _is_default(a, node.kwargs[a.name])
    }


def _default(argument: torch.Argument) -> object:
    return argument.default_value if argument.has_default_value() else NO_DEFAULT


def _is_default(argument: torch.Argument, value: object) -> bool:
    if argument.name == "pin_memory" and value is False:
        return True  # None and False mean the same
    default = _default(argument)
    return type(value) is type(default) and value == default


# -- operations that change nothing ----------------------------------------------------------------------------------


def _always(node: fx.Node) -> bool:
    return True


def _in_inference(node: fx.Node) -> bool:
    return node.args[2] is False


def _has_effect(node: fx.Node) -> bool:
    """As torch sees it, except that dropout in inference draws nothing."""
    return node.is_impure() and not (node.target is aten.native_dropout.default and _in_inference(node))


def _second_is(neutral: int) -> Callable[[fx.Node], bool]:
    def test(node: fx.Node) -> bool:
        return isinstance(node.args[1], int | float) and node.args[1] == neutral and "rounding_mode" not in node.kwargs

    return test


def _keeps_order(node: fx.Node) -> bool:
    dims = node.args[1]
    return isinstance(dims, list | tuple) and all(d in (i, i - len(dims)) for i, d in enumerate(dims))


NEUTRAL = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
COPIES = frozenset(
    {aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default, *NEUTRAL, operator.getitem}
)
"""Results with memory of their own: it matters where a state is written later, and in what a program returns."""

IDENTITIES: dict[object, Callable[[fx.Node], bool]] = {
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.lift_fresh.default), _always),
    **dict.fromkeys((aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default), _always),
    **dict.fromkeys((aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.contiguous.default), _always),
    # A view of the same shape, or a slice of the same length, is the whole tensor in the same order.
    **dict.fromkeys((aten.reshape.default, aten.expand.default, aten.slice.Tensor), _always),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _always),
    aten.permute.default: _keeps_order,
    aten.dropout.default: _in_inference,
    **{target: _second_is(neutral) for target, neutral in NEUTRAL.items()},
}
"""Operations that return their first argument when shape, dtype and device stay the same and the predicate holds."""


def _identity(node: fx.Node) -> fx.Node | None:
    """The node whose value `node` repeats, or None."""
    if node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]  # the first result of a call with several
        return node.args[0] if node.target is aten.native_dropout.default and _in_inference(node) else None  # type: ignore[return-value]
    holds = IDENTITIES.get(node.target)
    if holds is None or not holds(node):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if _same_value(node, source):
        return source
    inner = source.args[0] if source.target is node.target is aten.reshape.default else None
    return inner if isinstance(inner, fx.Node) and _same_value(node, inner) else None


def _same_value(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are tensors of provably the same shape, dtype and device."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if x.dtype != y.dtype or x.device != y.device or x.dim() != y.dim():
        return False
    return all(statically_known_true(m == n) for m, n in zip(x.shape, y.shape))


# -- duplicates ------------------------------------------------------------------------------------------------------


def _simplify(program: Program, removed: Counter[str]) -> None:
    """One sweep in topological order: replace a node by what it repeats, or by the first equal call."""
    written = written_nodes(program)
    returned = returned_nodes(program, _identity)
    changing = set(written)  # nodes whose value depends on memory that is written
    writes = 0  # how often such memory has been written so far
    first: dict[object, fx.Node] = {}
    for node in program.graph.nodes:
        same, kind = _identity(node), "identity"
        if same is not None and node.target in COPIES and (written or not _may_stand_in(same, returned)):
            same = None
        if same is None:
            if any(n in changing for n in node.all_input_nodes):
                changing.add(node)
            writes += any(True for _ in mutated_arguments(node))
            key = None if node in written else _key(program, node)
            if key is None:
                continue
            same, kind = first.setdefault((key, writes if node in changing else 0), node), "duplicate"
            if node in returned and same in returned:
                continue  # two outputs stay two tensors
        if same is not node:
            node.replace_all_uses_with(same)
            program.graph.erase_node(node)
            removed[kind] += 1


def _may_stand_in(node: fx.Node, returned: Counter[fx.Node]) -> bool:
    """Whether the memory of `node` may stand in for that of a copy: not where inputs or two outputs would share it."""
    *_, base = alias_chain(node, _identity)
    return node not in returned or (base.op == "call_function" and returned[node] == 1)


def _key(program: Program, node: fx.Node) -> object:
    """Equal for nodes that compute the same value; None where a node must stay what it is."""
    if node.op == "get_attr":
        t = fetch(program.module, str(node.target))
        same_memory = (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device) if t.numel() else node.target
        return "get_attr", same_memory
    if node.op != "call_function":
        return None
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return "size", value.node.expr
    if isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
    ):
        return None
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: object) -> object:
    """A hashable stand-in that tells 1, 1.0 and True apart (and 0.0 from -0.0)."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return type(value), repr(value)
