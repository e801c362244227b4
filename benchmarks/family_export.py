"""Export of a language model with dynamic batch and length, and what mixes its tokens besides attention."""

from __future__ import annotations

import re

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

MAX_BATCH = 64
MAX_LENGTH = 128
SHORTEST = 4  # with assertions: traced code treats a dimension of size one, such as T - 1 at T = 2, apart
_LIBRARY_FRAME = re.compile(r'File "[^"]*?/transformers/((?:models/)?[^"]+\.py)", line (\d+), in (\w+)')

aten = torch.ops.aten
_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.convolution.default,
}  # fmt: skip
_RUNNING = {
    aten.cumsum.default,
    aten.cumprod.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.logcumsumexp.default,
}
_SHIFTS = {aten.roll.default, aten.flip.default, aten.constant_pad_nd.default, aten.pad.default}
# Operations that take a tensor for its shape alone: what follows does not depend on the tokens.
_SHAPE_ONLY = re.compile(r"(ones|zeros|full|empty|rand|randn)_like|new_\w+|sym_size|sym_numel")


class BrokenAssertion(Exception):
    """What the export assumes of the sizes does not hold for all of them."""


def export(model: nn.Module, ids: Tensor) -> ExportedProgram:
    """Export ids [B, T] -> logits with B and T dynamic; raises what torch.export raises.

    torch proves some true conditions, such as min(8, T) <= T, only when asked to leave them in the graph as assertions.
    So that is tried next, and each assertion about sizes is evaluated at every length from `SHORTEST` on. Raises
    BrokenAssertion.
    """
    try:
        return _export(model, ids, shortest=2, deferred=False)
    except torch._dynamo.exc.UserError as error:
        if "Constraints violated" not in str(error):
            raise
        first = error
    try:
        exported = _export(model, ids, shortest=SHORTEST, deferred=True)
    except torch._dynamo.exc.UserError:
        raise first from None  # the same obstacle; the first message names the condition
    _check_assertions(exported)
    return exported


def _export(model: nn.Module, ids: Tensor, *, shortest: int, deferred: bool) -> ExportedProgram:
    shapes = {"ids": {0: Dim("batch", min=1, max=MAX_BATCH), 1: Dim("seq", min=shortest, max=MAX_LENGTH)}}
    with torch.no_grad():
        return torch.export.export(
            model, (ids,), dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=deferred
        )


def _check_assertions(exported: ExportedProgram) -> None:
    batch, length = _size_symbols(exported)
    for node in exported.graph.nodes:
        if node.target is not aten._assert_scalar.default or not isinstance(node.args[0], fx.Node):
            continue
        condition = node.args[0].meta["val"]
        if not isinstance(condition, torch.SymBool) or condition.node.expr.free_symbols - {batch, length}:
            continue  # about data: not a matter of sizes
        for size in range(SHORTEST, MAX_LENGTH + 1):
            if not all(bool(condition.node.expr.subs({batch: b, length: size})) for b in (1, 2)):
                raise BrokenAssertion(f"the export assumes {condition.node.expr}, which is false at length {size}")


def _size_symbols(exported: ExportedProgram) -> tuple[sympy.Symbol, sympy.Symbol]:
    """The symbols of batch and length."""
    ids = next(node for node in exported.graph.nodes if node.op == "placeholder" and node.name == "ids")
    batch, length = (next(iter(size.node.expr.free_symbols)) for size in ids.meta["val"].shape)
    return batch, length


def export_error(error: BaseException, trace: str) -> str:
    """One line on why an export failed: the innermost frame inside the library, and the first line of the message."""
    frames = _LIBRARY_FRAME.findall(trace)
    place = "{}:{} {}: ".format(*frames[-1]) if frames else ""
    return place + shorten(f"{type(error).__name__}: {error}")


def shorten(message: str, limit: int = 200) -> str:
    """The message on one line, at most `limit` characters."""
    line = " ".join(message.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def sequence_mixers(exported: ExportedProgram) -> list[str]:
    """Names of the operations, other than attention, that carry token values along the sequence.

    These are convolutions, running sums, shifts, slices that drop an end, and higher-order loops, over a dimension that
    contains the sequence length. Operations on positions alone (masks, rotary tables) do not count, nor does a
    dimension that merges batch and sequence, which expert routing sorts, nor a running count of integers, which numbers
    the tokens that are no padding.
    """
    graph = exported.graph
    ids = next(node for node in graph.nodes if node.op == "placeholder" and node.name == "ids")
    batch, length = _size_symbols(exported)

    def over_sequence(size: int | torch.SymInt) -> bool:
        symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
        return length in symbols and batch not in symbols

    found: dict[str, None] = {}
    of_tokens: set[fx.Node] = {ids}
    for node in graph.nodes:
        if node.op != "call_function" or not of_tokens.intersection(node.all_input_nodes):
            continue
        name = node.target.__name__ if hasattr(node.target, "__name__") else str(node.target)
        if _SHAPE_ONLY.match(name):
            continue
        of_tokens.add(node)
        mixer = _mixer(node, name, over_sequence)
        if mixer:
            found[mixer] = None
    return list(found)


def _mixer(node: fx.Node, name: str, over_sequence) -> str | None:
    """The operation's name when it moves token values along the sequence."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return None if "set_grad" in name or "autocast" in name else name
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    value = source.meta.get("val") if source is not None else None
    if not isinstance(value, Tensor):
        return None
    if node.target in _CONVOLUTIONS:
        return name if any(map(over_sequence, value.shape[2:])) else None
    if node.target in _RUNNING:
        return name if value.is_floating_point() and over_sequence(value.shape[node.args[1]]) else None
    if node.target in _SHIFTS:
        return name if _moves(node, value, over_sequence) else None
    if node.target is aten.slice.Tensor and value.is_floating_point():
        return "slice" if _drops_tokens(node, value, over_sequence) else None
    return None


def _drops_tokens(node: fx.Node, value: Tensor, over_sequence) -> bool:
    """Whether a slice drops tokens. An attention sink is a column behind the T keys: dropping it moves nothing."""
    dim = node.args[1] if len(node.args) > 1 else 0
    start = node.args[2] if len(node.args) > 2 else 0
    before, after = str(value.shape[dim]), str(node.meta["val"].shape[dim])
    if not over_sequence(value.shape[dim]) or before == after:
        return False
    return start not in (0, None) or before != f"{after} + 1"


def _moves(node: fx.Node, value: Tensor, over_sequence) -> bool:
    """Whether a roll, flip or pad touches a sequence dimension."""
    if node.target in (aten.roll.default, aten.flip.default):
        dims = node.args[-1] if isinstance(node.args[-1], (list, tuple)) else range(value.dim())
        return any(over_sequence(value.shape[dim]) for dim in dims)
    padding = node.args[1]
    padded = [
        value.dim() - 1 - index // 2 for index, amount in enumerate(padding) if not isinstance(amount, int) or amount
    ]
    return value.is_floating_point() and any(over_sequence(value.shape[dim]) for dim in padded)
