"""Random trees of drafts, and what steps over them must give."""

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import accelc
from accelc.capture import forward_logits
from accelc.runtime.speculation.trees import LIMIT, Tree

KNOWN = (7, 3)
"""Committed tokens of two rows."""
TOLERANCE = 2e-5


@st.composite
def trees(draw: st.DrawFn, most: int = LIMIT) -> Tree:
    """Any tree, its nodes in any order that has parents first."""
    size = draw(st.integers(1, most))
    parents, ranks, next_rank = [-1], [0], [0] * size
    for node in range(1, size):
        parent = draw(st.integers(0, node - 1))
        parents.append(parent)
        ranks.append(next_rank[parent])
        next_rank[parent] += 1
    return Tree(tuple(parents), tuple(ranks))


def path_to(tree: Tree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = tree.parents[node]
    return path[::-1]


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


def check_trees(model: nn.Module, decoder: accelc.CompiledDecoder, vocabulary: int) -> None:
    """Random trees give the logits of each path run alone, and committing a path leaves the caches as if it had been
    decoded.
    """

    @settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(tree=trees(most=10))
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
