"""QuantizeWeights: the weights of linears, and embeddings tied to them, in few bits."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Exactness, Program
from accelc.ir.errors import InputError, OptionValueError
from accelc.ir.program import fetch, store
from accelc.ir.quantized import QuantizedWeight, Scheme
from accelc.passes.base import Pass, PassResult
from accelc.passes.quantize.half_quadratic import half_quadratic
from accelc.passes.quantize.rounding import round_to_nearest
from accelc.passes.registry import register_pass

aten = torch.ops.aten
ops = torch.ops.accelc

METHODS: dict[str, Callable[[Tensor, Scheme], QuantizedWeight]] = {
    "rtn": round_to_nearest,
    "hqq": half_quadratic,
}
"""What needs no data: rounding with a search of the range, and half-quadratic quantization."""


@register_pass
@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Replace the weights of linears by codes of few bits (`accelc.ir.quantized`), which `accelc::quantized_linear`
    reads; the float weights are not referenced any more.

    * ``scheme``: of all weights but the head's, for example "int4:g64" (see `Scheme.parse`).
    * ``head``: scheme of the projection to the logits; "" takes ``scheme``, "none" leaves it. An embedding tied to it
      reads the same codes.
    * ``method``: "rtn" or "hqq".
    * ``include``, ``exclude``: patterns (`fnmatch`) of weight names, separated by commas.

    LOSSY: its loss is a rise of perplexity on text (`accelc eval`). Raises OptionValueError for unknown names and for
    patterns that match nothing, InputError for weights that are not finite; the program given is left as it was.
    """

    name = "quantize_weights"
    after = ("derive_step", "recognise_masks")
    before = ("last_logits",)
    exactness = Exactness.LOSSY

    scheme: str = "int4"
    head: str = "int8"
    method: str = "rtn"
    include: str = "*"
    exclude: str = ""

    def run(self, program: Program) -> PassResult:
        if self.method not in METHODS:
            raise OptionValueError(f"unknown method {self.method!r}", where=str(self),
                                   remedy=f"Use one of: {', '.join(METHODS)}.")  # fmt: skip
        program = program.clone()
        linears = _linears(program)
        chosen = self._choose(linears)
        head = _head(program)
        before = after = matches = 0
        notes = []
        for path, nodes in linears.items():
            is_head = head in nodes
            text = self.head or self.scheme if is_head else self.scheme
            if path not in chosen or text == "none":
                continue
            weight = fetch(program.module, path).detach()
            made = _quantize(weight, Scheme.parse(text), METHODS[self.method], path)
            _replace(program, path, nodes, made)
            matches += len(nodes)
            before += weight.numel() * weight.element_size()
            after += made.nbytes
            if is_head:
                notes.append(f"head {path}: {made.scheme}")
        program.graph.eliminate_dead_code()
        program.module.recompile()
        notes.insert(0, f"{matches} linears in {self.scheme} by {self.method}, {before} bytes to {after}")
        return PassResult(program.clone(), matches, tuple(notes))

    def _choose(self, linears: dict[str, list[fx.Node]]) -> set[str]:
        chosen = set(linears)
        for patterns, keep in ((self.include, True), (self.exclude, False)):
            listed = [p.strip() for p in patterns.split(",") if p.strip()]
            for pattern in listed:
                if not fnmatch.filter(linears, pattern):
                    raise OptionValueError(
                        f"the pattern {pattern!r} matches no weight of a linear",
                        where=str(self),
                        remedy=f"Names are, for example: {', '.join(list(linears)[:4])}.",
                    )
            matched = {name for name in linears for pattern in listed if fnmatch.fnmatch(name, pattern)}
            chosen = chosen & matched if keep else chosen - matched
        return chosen


def _linears(program: Program) -> dict[str, list[fx.Node]]:
    """Linears by the name of their weight [N, K], which no operation but linears and embeddings reads."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    refused = set()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target)
        for user in node.users:
            if (
                user.target is aten.linear.default
                and user.args[1] is node
                and node not in (user.args[0], *user.args[2:])
            ):
                found[path].append(user)
            elif user.target is not aten.embedding.default or user.args[0] is not node:
                refused.add(path)
    return {
        path: nodes
        for path, nodes in found.items()
        if path not in refused and fetch(program.module, path).dim() == 2
        and fetch(program.module, path).is_floating_point()
    }  # fmt: skip


def _head(program: Program) -> fx.Node | None:
    """The linear that makes the logits, through whatever treats them element by element."""
    node = program.output_node("logits") if "logits" in program.outputs else None
    while node is not None and node.target is not aten.linear.default:
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        node = inputs[0] if len(inputs) == 1 else None
    return node


def _quantize(
    weight: Tensor, scheme: Scheme, method: Callable[[Tensor, Scheme], QuantizedWeight], path: str
) -> QuantizedWeight:
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"the weight {path} holds NaN or infinite values", remedy="Repair the checkpoint.")
    return method(weight, scheme)


def _replace(program: Program, path: str, nodes: list[fx.Node], made: QuantizedWeight) -> None:
    """Let the linears, and the embeddings tied to them, read the codes."""
    graph = program.graph
    readers = [n for n in graph.nodes if n.op == "get_attr" and n.target == path]
    tensors: list[fx.Node | None] = []
    first = next(iter(graph.nodes))
    for part, tensor in (("codes", made.codes), ("scales", made.scales), ("zeros", made.zeros)):
        if tensor is None:
            tensors.append(None)
            continue
        name = f"{path.removesuffix('.weight')}.quantized.{part}"
        store(program.module, name, tensor)
        with graph.inserting_before(first):
            tensors.append(graph.get_attr(name))
    bits = made.scheme.bits
    for node in nodes:
        bias = node.args[2] if len(node.args) > 2 else None
        with graph.inserting_before(node):
            new = graph.call_function(ops.quantized_linear.default, (node.args[0], *tensors, bias, bits, made.rows))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for reader in readers:
        for user in list(reader.users):  # embeddings
            dtype = fetch(program.module, path).dtype
            with graph.inserting_before(user):
                new = graph.call_function(
                    ops.quantized_embedding.default, (user.args[1], *tensors, bits, made.columns, dtype)
                )
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            graph.erase_node(user)
