"""Steps over trees beyond what test_greedy.py checks of every family: large trees, and the pass by itself."""

import functools

import pytest
import torch
from draft_trees import TOLERANCE, expected_logits
from families import FAMILIES
from torch import nn

import accelc
from accelc.ir.errors import PassError
from accelc.passes.tree_attention import TreeAttention
from accelc.runtime.speculation.trees import Tree


@functools.cache
def decoder_of(name: str) -> tuple[nn.Module, accelc.CompiledDecoder]:
    model = FAMILIES[name].build()
    return model, accelc.compile(model, max_length=64, check="off", cache=False)


def test_trees_of_more_than_a_word() -> None:
    model, decoder = decoder_of("llama")
    tree = Tree.of_paths([(0,) * n for n in range(1, 40)] + [(r,) for r in range(1, 60)])
    assert tree.size > 64
    nodes = torch.arange(3, 3 + tree.size)[None] % 90
    layout = tree.layout()
    with decoder.start([[5, 6, 7]]) as session, session.alone():
        got = session.verify(nodes, layout.depths, layout.words)
        expected = expected_logits(model, [[5, 6, 7]], nodes, tree)
        assert float((got - expected).abs().max()) <= TOLERANCE * float(expected.max() - expected.min())


def test_the_pass_takes_a_chain_once() -> None:
    _, decoder = decoder_of("llama")
    step = decoder.programs["step"]
    verify = TreeAttention().run(step).program
    assert verify.inputs == ("tokens", "positions", "lengths", "tree")
    with pytest.raises(PassError, match="chain"):
        TreeAttention().run(verify)
