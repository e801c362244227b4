"""Heads as programs: captured like any module, their cached step derived, inserted behind a model's hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor, nn

from accelc.exported import is_functional, plain_module
from accelc.heads.modules import DraftHeads, HeadsConfig
from accelc.ir import Program
from accelc.ir.errors import DraftError
from accelc.ir.program import fetch, graph_module
from accelc.ir.shapes import INPUTS, propagate
from accelc.passes.draft_heads import DraftHeads as InsertHeads
from accelc.passes.output_projection import projection
from accelc.passes.tap_hidden import HIDDEN
from accelc.pipeline import drafting_pipeline, simplify_pipeline, step_pipeline

aten = torch.ops.aten


class Embedding(nn.Module):
    """A program's own look-up of tokens: ids [...] -> [..., E]."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        super().__init__()
        self._target = node.target
        self._args: list[str | tuple[object] | None] = []
        for index, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                self.register_buffer(f"table_{index}", fetch(program.module, str(argument.target)))
                self._args.append(f"table_{index}")
            else:
                self._args.append(None if isinstance(argument, fx.Node) else (argument,))

    def forward(self, tokens: Tensor) -> Tensor:
        arguments = [tokens if a is None else getattr(self, a) if isinstance(a, str) else a[0] for a in self._args]
        return self._target(*arguments)  # type: ignore[operator, no-any-return]


@dataclass(frozen=True)
class Backbone:
    """What heads need to know of a model: the sizes of its hidden states, how it embeds tokens, its last layer."""

    hidden: int
    """H."""
    vocab_size: int
    dtype: torch.dtype
    embed: Embedding | None
    """None where the model embeds tokens by something else than one table."""
    embedding: int
    """E, 0 without a table."""
    vocabulary: Tensor | None
    """[V, H], None where it is not kept as floats."""

    @classmethod
    def of(cls, tapped: Program) -> Backbone:
        """From a forward or a step that `tap_hidden` went over."""
        if "lengths" in tapped.inputs:
            tapped = tapped.clone()
            propagate(tapped)
        hidden = tapped.output_node(HIDDEN).meta["val"]
        layer = projection(tapped.output_node("logits"))
        assert layer is not None  # it was tapped
        weight = layer.args[1]
        plain = layer.target is aten.linear.default and isinstance(weight, fx.Node) and weight.op == "get_attr"
        embed = embedding_of(tapped)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=tapped.device)
        return cls(
            hidden=int(hidden.shape[-1]),
            vocab_size=int(tapped.facts["capture"]["vocab_size"]),  # type: ignore[index]
            dtype=hidden.dtype,
            embed=embed,
            embedding=0 if embed is None else int(embed(ids).shape[-1]),
            vocabulary=fetch(tapped.module, str(weight.target)) if plain else None,  # type: ignore[union-attr]
        )


def embedding_of(program: Program) -> Embedding | None:
    """The operation that reads a table by the tokens themselves."""
    tokens = program.placeholders()[0]
    for node in tokens.users:
        tables = [n for n in node.all_input_nodes if n.op == "get_attr"]
        reads_nothing_else = node.all_input_nodes == [*tables, tokens]
        if tables and reads_nothing_else and fetch(program.module, str(tables[0].target)).dim() == 2:
            return Embedding(program, node)
    return None


def capture_module(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], *, time: int | None, name: str
) -> Program:
    """A module's graph as a program, the batch of its inputs dynamic; `time`: the longest sequence, where dim 1 runs
    along one.
    """
    dims: dict[int, torch.export.Dim] = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    if time is not None:
        dims[1] = torch.export.Dim("length", min=2, max=max(time, 8))
    with torch.inference_mode(False), torch.no_grad():
        exported = torch.export.export(
            module.eval(), tuple(inputs.values()), dynamic_shapes=tuple(dims for _ in inputs), strict=False
        )
        if not is_functional(exported.graph):
            exported = exported.run_decompositions({})
    return Program(name, plain_module(exported, tuple(inputs)), tuple(inputs), tuple(outputs))


def hidden_program(heads: DraftHeads, backbone: Backbone, max_length: int) -> Program:
    """What heads read, hidden [B, N, H] -> hidden [B, N, H]: the hidden states as they are, or the derived step of the
    layer in front.
    """
    example = torch.zeros(2, 7, backbone.hidden, dtype=backbone.dtype, device=device_of(heads))
    if heads.prefix is None:
        graph = fx.Graph()
        graph.output((graph.placeholder(HIDDEN),))
        program = Program("hidden", graph_module(nn.Module(), graph), (HIDDEN,), (HIDDEN,))
    else:
        forward = capture_module(heads.prefix, {HIDDEN: example}, (HIDDEN,), time=max_length, name="forward")
        forward.facts["capture"] = {"max_length": max_length}
        program = step_pipeline().run(forward)
    program.facts[INPUTS] = {HIDDEN: (("B", "N", backbone.hidden), backbone.dtype)}
    return program


def draft_program(base: Program, heads: DraftHeads, form: nn.Module, backbone: Backbone) -> Program:
    """From `hidden_program` and a form of draft (`accelc.heads.drafting`) to the program that drafts."""
    device = device_of(heads)
    example = torch.zeros(2, 1, backbone.hidden, dtype=backbone.dtype, device=device)
    roots = torch.zeros(2, 1, dtype=torch.int64, device=device)
    drafting = capture_module(form, {HIDDEN: example, "root": roots}, form.outputs, time=None, name="heads")  # type: ignore[arg-type]
    return drafting_pipeline(InsertHeads(simplify_pipeline().run(drafting))).run(base)


def device_of(heads: DraftHeads) -> torch.device:
    """Where the heads' weights are."""
    return next(heads.parameters()).device


def refuse_without_table(config: HeadsConfig, backbone: Backbone, where: str = "") -> None:
    """Raise DraftError where heads read embeddings that the model does not have."""
    if config.sequential and backbone.embed is None:
        raise DraftError(
            "hydra heads read the embeddings of guessed tokens, and this model has no table of them",
            where=where,
            remedy="Use medusa heads, which read the hidden states alone.",
        )
