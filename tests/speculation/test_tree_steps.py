"""A tree step gives the logits of each path run alone, for every family; and committing a path leaves the caches as if
the path had been decoded.
"""

import functools

import pytest
import torch
from draft_trees import trees
from families import FAMILIES, Expect, names
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import accelc
from accelc.capture import forward_logits
from accelc.ir.errors import PassError
from accelc.passes.tree_attention import TreeAttention
from accelc.runtime.speculation.trees import Tree

KNOWN = (7, 3)
"""Committed tokens of two rows."""
TOLERANCE = 2e-5


@functools.cache
def decoder_of(name: str) -> tuple[nn.Module, accelc.CompiledDecoder]:
    model = FAMILIES[name].build()
    return model, accelc.compile(model, max_length=64, check="off", cache=False)


def expected_logits(model: nn.Module, prefix: list[list[int]], nodes: Tensor, tree: Tree) -> Tensor:
    """The model's own logits [B, N, V] behind each path."""
    paths = tree.layout().paths[0]
    rows = []
    for row, known in enumerate(prefix):
        of_row = []
        for node, depth in enumerate(tree.depths):
            ids = torch.tensor([*known, *nodes[row, paths[node, : depth + 1]].tolist()])
            of_row.append(forward_logits(model, ids[None])[0, -1])
        rows.append(torch.stack(of_row))
    return torch.stack(rows)


@pytest.mark.parametrize("name", names(Expect.DERIVED))
def test_each_path_is_as_if_alone(name: str) -> None:
    model, decoder = decoder_of(name)
    vocabulary = FAMILIES[name].vocabulary

    @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(tree=trees(most=12))
    def check(tree: Tree) -> None:
        generator = torch.Generator().manual_seed(tree.size)
        prefix = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in KNOWN]
        nodes = torch.randint(3, vocabulary, (2, tree.size), generator=generator)
        layout = tree.layout()
        expected = expected_logits(model, prefix, nodes, tree)
        spread = float(expected.max() - expected.min())
        with decoder.start(prefix) as session, session.alone():
            got = session.verify(nodes, layout.depths, layout.words)
            assert float((got - expected).abs().max()) <= TOLERANCE * spread
            # Row 0 keeps the path to its deepest node, row 1 the root alone.
            last = int(layout.depths[0].argmax())
            path = torch.stack([layout.paths[0, last], torch.arange(tree.depth + 1)])
            counts = torch.tensor([tree.depths[last] + 1, 1])
            session.commit(path, counts)
            assert session.lengths.tolist() == [known + int(count) for known, count in zip(KNOWN, counts)]
            after = session.decode(torch.tensor([4, 5])).clone()
        for row, token in enumerate((4, 5)):
            kept = nodes[row, path[row, : counts[row]]].tolist()
            alone = forward_logits(model, torch.tensor([[*prefix[row], *kept, token]]))[0, -1]
            assert float((after[row] - alone).abs().max()) <= TOLERANCE * spread

    check()


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
    for wrong in (verify, decoder.programs["prefill"]):
        if wrong is verify:
            with pytest.raises(PassError, match="chain"):
                TreeAttention().run(wrong)
