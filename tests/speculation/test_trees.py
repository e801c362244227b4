"""Trees of drafts: what is one, what tensor programs see of it, and which is best."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from draft_trees import path_to, trees
from hypothesis import given, settings

from accelc.ir.errors import TreeError
from accelc.runtime.speculation.trees import LIMIT, MEDUSA, RECYCLING, WORD, Tree, best_tree


@settings(max_examples=60, deadline=None)
@given(trees())
def test_layouts_say_what_the_parents_do(tree: Tree) -> None:
    layout = tree.layout()
    assert (layout.size, layout.depth, layout.width) == (tree.size, tree.depth, tree.width)
    for node in range(tree.size):
        path = path_to(tree, node)
        assert layout.depths[0, node] == tree.depths[node] == len(path) - 1
        assert layout.paths[0, node].tolist() == path + list(range(len(path), tree.depth + 1))
        words = layout.words[0, node].tolist()
        bits = {j for j in range(LIMIT) if words[j // WORD] >> (j % WORD) & 1}
        assert bits == set(path)


@settings(max_examples=30, deadline=None)
@given(trees(40))
def test_by_level_keeps_the_tree(tree: Tree) -> None:
    sorted_ = tree.by_level()
    ranks = lambda t: sorted([t.ranks[n] for n in path_to(t, node)][1:] for node in range(t.size))  # noqa: E731
    assert sorted(sorted_.depths) == list(sorted_.depths)
    for node in range(tree.size):
        assert ranks(tree) == ranks(sorted_), node


@pytest.mark.parametrize(
    ("paths", "word"),
    [
        ([(0, 0)], "no parent"),
        ([(0,), (0,)], "twice"),
        ([()], "empty"),
        ([(-1,)], "ranks"),
        ([(0.5,)], "ranks"),
        ([(i,) for i in range(LIMIT)], "129 nodes"),
    ],
)
def test_what_is_no_tree(paths: list[tuple[int, ...]], word: str) -> None:
    with pytest.raises(TreeError, match=word):
        Tree.of_paths(paths)


@pytest.mark.parametrize(
    ("parents", "ranks"), [((), ()), ((0,), (0,)), ((-1, 1), (0, 0)), ((-1, 0), (0,)), ((-1, 0, 0), (0, 1, 1))]
)
def test_parents_that_make_no_tree(parents: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    with pytest.raises(TreeError):
        Tree(parents, ranks)


def test_the_published_trees() -> None:
    count = lambda tree: [tree.depths.count(d) for d in range(1, tree.depth + 1)]  # noqa: E731
    assert (count(MEDUSA), MEDUSA.width) == ([10, 28, 23, 2], 10)
    assert (count(RECYCLING), RECYCLING.width) == ([8, 21, 25, 15, 8, 3], 8)
    assert sum(n not in MEDUSA.parents for n in range(MEDUSA.size)) == 42  # leaves
    assert Tree.chain(3) == Tree.of_paths([(0,), (0, 0), (0, 0, 0)])


def worth(tree: Tree, accuracy: list[list[float]]) -> float:
    """Expected accepted drafts: each node's probability of being accepted, summed."""
    return sum(
        math.prod(accuracy[depth - 1][tree.ranks[node]] for depth, node in enumerate(path_to(tree, n)) if depth)
        for n in range(1, tree.size)
    )


@settings(max_examples=25, deadline=None)
@given(
    accuracy=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=2),
    nodes=st.integers(1, 5),
)
def test_no_tree_expects_more_than_the_best(accuracy: list[list[int]], nodes: int) -> None:
    """Ranks are right with falling probability; all trees of so many nodes are tried."""
    table = [[a / 20 for a in sorted(row, reverse=True)] for row in accuracy]
    every = [(r,) for r in range(3)] + [(r, s) for r in range(3) for s in range(3)]
    most = 0.0
    for chosen in itertools.combinations(every, nodes):
        if all(len(p) == 1 or p[:1] in chosen for p in chosen):
            most = max(most, worth(Tree.of_paths(sorted(chosen, key=len)), table))
    best = best_tree(table, nodes)
    assert worth(best, table) == pytest.approx(most)
    for size in range(2, best.size + 1):
        assert worth(best.cut(size), table) == pytest.approx(worth(best_tree(table, size - 1), table))


def test_accuracies_that_make_no_tree() -> None:
    for accuracy, nodes in (([], 3), ([[]], 3), ([[0.5]], 0), ([[1.5]], 2)):
        with pytest.raises(TreeError):
            best_tree(accuracy, nodes)
    assert best_tree([[0.5], [0.5]], 10).size == 3  # there are no more candidates


def test_layouts_of_different_rows() -> None:
    """Rows with trees of their own: dynamic trees are made so."""
    from accelc.runtime.speculation.trees import layout_of

    rows = [Tree((-1, 0, 0, 1), (0, 0, 1, 0)), Tree.chain(3)]
    parents, ranks = (torch.tensor([getattr(t, name) for t in rows]) for name in ("parents", "ranks"))
    together = layout_of(parents, ranks, depth=3, width=2)
    for row, tree in enumerate(rows):
        alone = tree.layout()
        assert torch.equal(together.depths[row], alone.depths[0])
        assert torch.equal(together.words[row], alone.words[0])
        assert torch.equal(together.paths[row][:, : tree.depth + 1], alone.paths[0])


@settings(max_examples=30, deadline=None)
@given(tree=trees(40), share=st.floats(0, 1))
def test_a_layout_is_cut_as_its_tree_is(tree: Tree, share: float) -> None:
    size = 1 + int(share * (tree.size - 1))
    got, want = tree.layout().cut(size), tree.cut(size).layout()
    assert got.size == size
    for name in ("parents", "ranks", "depths", "words"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(got.paths[..., : want.depth + 1], want.paths)
    assert got.paths.max() < size
