"""Draft heads with random weights for any model under test."""

from __future__ import annotations

import torch

import accelc
from accelc.heads.files import HeadsFile
from accelc.heads.graph import Backbone
from accelc.heads.modules import HYDRA, MEDUSA, DraftHeads, HeadsConfig
from accelc.passes import Pipeline
from accelc.passes.tap_hidden import TapHidden
from accelc.runtime.speculation.trees import Tree

TREE = Tree.of_paths([(0,), (1,), (2,), (0, 0), (1, 0), (0, 1)])


def heads_of(
    decoder: accelc.CompiledDecoder, kind: str = HYDRA, *, prefix: bool = True
) -> accelc.Medusa | accelc.Hydra:
    """Right by chance, where the vocabulary is small. Medusa's in any case where the model has no table of tokens; a
    prefix layer where its hidden states are even.
    """
    backbone = Backbone.of(Pipeline([TapHidden()]).run(decoder.programs["step"]))
    kind = MEDUSA if backbone.embed is None else kind
    torch.manual_seed(0)
    sizes = {"hidden": backbone.hidden, "embedding": max(1, backbone.embedding), "vocab_size": backbone.vocab_size}
    heads = DraftHeads(HeadsConfig(kind, **sizes, heads=2, prefix=prefix and backbone.hidden % 2 == 0))
    return (accelc.Hydra if kind == HYDRA else accelc.Medusa)(HeadsFile(heads.eval()), TREE)
