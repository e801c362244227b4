"""Medusa and Hydra: drafters whose graph part are heads behind the model's hidden states."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from accelc.heads.drafting import DynamicDraft, FixedDraft
from accelc.heads.files import HeadsFile, load_heads
from accelc.heads.graph import Backbone, draft_program, hidden_program
from accelc.heads.modules import HYDRA, MEDUSA
from accelc.ir import Program
from accelc.ir.errors import DraftError, TreeError
from accelc.passes import Pipeline
from accelc.passes.quantize_weights import QuantizeWeights, quantization
from accelc.passes.tap_hidden import TapHidden
from accelc.runtime.speculation.draft import Drafter, DraftKind, Setting, Source, register_drafter
from accelc.runtime.speculation.heads import Context, Drafting, HeadDrafts
from accelc.runtime.speculation.trees import MEDUSA as PUBLISHED_TREE
from accelc.runtime.speculation.trees import Tree, best_tree
from accelc.runtime.steps import StepFunction

NODES = 64
"""Of trees that are not given, the root included."""
WIDTH = 8
"""Children of a node in dynamic trees."""


@dataclass(frozen=True)
class _Heads(Drafter):
    kind: ClassVar[DraftKind] = DraftKind.DETERMINISTIC
    made: ClassVar[str]
    """Kind of heads."""

    heads: str | Path | HeadsFile
    tree: Tree | Literal["dynamic"] | None = None
    quantize: str | QuantizeWeights | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.heads, str | Path | HeadsFile):
            raise DraftError(
                f"heads are {type(self.heads).__name__}", remedy="Give a path, or what load_heads returns."
            )
        given = isinstance(self.tree, Tree) and self.tree.depth >= 1
        if not given and self.tree not in (None, "dynamic"):
            raise DraftError(f"tree is {self.tree!r}", remedy='Give a Tree of at least two nodes, or "dynamic".')
        quantization(self.quantize)

    def bind(self, setting: Setting) -> Source:
        file = self.heads if isinstance(self.heads, HeadsFile) else load_heads(self.heads)
        if file.config.kind != self.made:
            raise DraftError(f"these are {file.config.kind} heads", where=file.source,
                             remedy=f"Use accelc.{file.config.kind.capitalize()}.")  # fmt: skip
        if setting.step is None or setting.compile is None:
            raise DraftError("heads are inserted into a program, and this decoder has none",
                             remedy="Make it with accelc.compile.")  # fmt: skip
        backbone = Backbone.of(Pipeline([TapHidden()]).run(setting.step))
        file.check(backbone)
        return _bound(file, backbone, self.tree, self.quantize, setting, setting.compile)


@register_drafter
@dataclass(frozen=True)
class Medusa(_Heads):
    """Drafts from heads that read the last hidden state, each guessing one token further ahead (Cai et al. 2024).

    * ``heads``: a file of `accelc train-heads`, or in the layout that the Medusa authors publish; a decoder reads it
      when it first drafts.
    * ``tree``: a `Tree` of at most as many levels as there are heads, by default the one that expects most by the
      accuracies in the file (without them Medusa's own); "dynamic" builds the tree of the likeliest paths at each step.
    * ``quantize``: keep the heads' weights in few bits: drafts may be worse, never the output.
    """

    name: ClassVar[str] = "medusa"
    made: ClassVar[str] = MEDUSA


@register_drafter
@dataclass(frozen=True)
class Hydra(_Heads):
    """Drafts from heads that also read the tokens guessed before theirs (Ankner et al. 2024); files whose heads stand
    behind a prefix layer are Hydra++. Options as for `Medusa`.
    """

    name: ClassVar[str] = "hydra"
    made: ClassVar[str] = HYDRA


def drafter_for(path: str | Path) -> Medusa | Hydra:
    """The drafter for heads in a file, whatever their kind."""
    file = load_heads(path)
    return Hydra(file) if file.config.kind == HYDRA else Medusa(file)


def _bound(
    file: HeadsFile,
    backbone: Backbone,
    asked: Tree | Literal["dynamic"] | None,
    quantize: str | QuantizeWeights | None,
    setting: Setting,
    compile_step: Callable[[Program], StepFunction],
) -> Source:
    heads = file.heads
    if any((p.dtype, p.device) != (backbone.dtype, setting.device) for p in heads.parameters()):
        heads = copy.deepcopy(heads).to(dtype=backbone.dtype, device=setting.device)
    tree = None if asked == "dynamic" else asked or default_tree(file)
    width = min(WIDTH, backbone.vocab_size)
    if tree is not None and tree.depth > heads.config.heads:
        raise TreeError(f"a tree of {tree.depth} levels for {heads.config.heads} heads",
                        remedy="Leave out the deeper nodes.")  # fmt: skip
    if tree is not None and tree.width > backbone.vocab_size:
        raise TreeError(f"a tree with {tree.width} candidates for {backbone.vocab_size} tokens")
    size = tree.size if tree is not None else min(NODES, _reachable(width, heads.config.heads))
    base = hidden_program(heads, backbone, setting.max_length)
    smaller = Pipeline([quantizing]) if (quantizing := quantization(quantize)) is not None else None

    @functools.cache
    @setting.call.compiling.timed
    @torch.inference_mode(False)
    @torch.no_grad()
    def drafting(nodes: int) -> Drafting:
        nodes = min(nodes, size)
        cut = None if tree is None else tree.cut(nodes)
        form: nn.Module = (
            DynamicDraft(heads, backbone.embed, nodes, width) if cut is None else FixedDraft(heads, backbone.embed, cut)
        )
        program = draft_program(base, heads, form.to(setting.device), backbone)
        run = compile_step(program if smaller is None else smaller.run(program))
        return Drafting(run, None if cut is None else cut.layout(setting.device), width)

    context = None
    if heads.prefix is not None:
        context = Context(compile_step(base), base.states, setting.capacity, setting.max_length)
    depth = heads.config.heads
    return HeadDrafts(drafting, (TapHidden(),), size=size, depth=depth, context=context, call=setting.call)


def _reachable(width: int, depth: int) -> int:
    """Nodes that a dynamic tree can have."""
    return 1 + width + (depth - 1) * width * width


def default_tree(file: HeadsFile) -> Tree:
    """The tree that expects most by the heads' accuracies; without them Medusa's, as deep as the heads go."""
    if file.accuracy:
        return best_tree(file.accuracy, NODES - 1)
    return Tree.of_paths([path for path in PUBLISHED_TREE.paths() if len(path) <= file.config.heads])
