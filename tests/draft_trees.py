"""Random trees of drafts, for hypothesis."""

import hypothesis.strategies as st

from accelc.runtime.speculation.trees import LIMIT, Tree


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
