"""What the drafters that need no training propose, told from plain Python."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from accelc.functions import compile_function
from accelc.runtime.functions import Functions
from accelc.runtime.speculation.draft import NOTHING, Accepted, Draft, Setting, Text
from accelc.runtime.speculation.prompt_lookup import PromptLookup
from accelc.runtime.speculation.token_recycling import TokenRecycling
from accelc.runtime.speculation.trees import RECYCLING, Tree

VOCABULARY = 7
CALLS = {"as written": Functions(), "compiled": Functions(compile_function)}


def text_of(rows: list[list[int]], room: int = 4) -> Text:
    longest = max(map(len, rows)) + room
    tokens = torch.tensor([row + [3] * (longest - len(row)) for row in rows])  # what lies behind must not matter
    return Text(tokens, torch.tensor([len(row) for row in rows]))


def setting(call: str) -> Setting:
    return Setting(VOCABULARY, torch.device("cpu"), CALLS[call])


def looked_up(row: list[int], ngram: int, count: int) -> list[int]:
    """The same by hand."""
    for n in range(min(ngram, len(row) - 1), 0, -1):
        ends = [i for i in range(n - 1, len(row) - 1) if row[i - n + 1 : i + 1] == row[-n:]]
        if ends:
            known = row[ends[-1] + 1 :]
            return [known[j % len(known)] for j in range(count)]
    return [NOTHING] * count


@pytest.mark.parametrize("call", CALLS)
def test_prompt_lookup_copies_what_followed(call: str) -> None:
    @settings(max_examples=60 if call == "as written" else 8, deadline=None)
    @given(
        rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=3),
        ngram=st.integers(1, 4),
        count=st.integers(1, 6),
    )
    def check(rows: list[list[int]], ngram: int, count: int) -> None:
        text = text_of(rows)
        draft = (
            PromptLookup(tokens=count, ngram=ngram).bind(setting(call)).start(text, None, ()).propose(text, count + 1)
        )
        assert draft.tokens.tolist() == [[row[-1], *looked_up(row, ngram, count)] for row in rows]

    check()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("tree", [RECYCLING.cut(12), Tree.chain(3), RECYCLING], ids=["cut", "chain", "whole"])
def test_token_recycling_reads_what_it_learned(call: str, tree: Tree) -> None:
    proposer = TokenRecycling(tree).bind(Setting(11, torch.device("cpu"), CALLS[call])).start(text_of([[1]]), None, ())
    text = text_of([[4, 2], [5]])
    tree = tree.by_level()
    memory = {token: [0] * tree.width for token in range(11)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        draft = proposer.propose(text, tree.size)
        for row, root in enumerate((2, 5)):
            expected = [root]
            for node in range(1, tree.size):
                expected.append(memory[expected[tree.parents[node]]][tree.ranks[node]])
            assert draft.tokens[row].tolist() == expected
        logits = torch.randn(2, tree.size, 11, generator=generator)
        nodes = torch.tensor([tree.size - 1, 0])
        layout = draft.layout
        accepted = Accepted(nodes, layout.paths[0][nodes], layout.depths[0][nodes] + 1, torch.empty(0))
        proposer.observe(draft, logits, accepted, ())
        remember(memory, draft, logits, accepted)


def remember(memory: dict[int, list[int]], draft: Draft, logits: torch.Tensor, accepted: Accepted) -> None:
    """The deepest accepted node of a token counts, otherwise the last one."""
    best: dict[int, tuple[int, int, list[int]]] = {}
    for row in range(len(draft.tokens)):
        kept = accepted.path[row, : int(accepted.counts[row])].tolist()
        for node, token in enumerate(draft.tokens[row].tolist()):
            depth = kept.index(node) + 1 if node in kept else 0
            order = (depth, row * draft.tokens.shape[1] + node)
            top = logits[row, node].topk(len(memory[token])).indices.tolist()
            if token not in best or order > best[token][:2]:
                best[token] = (*order, top)
    for token, (_, _, top) in best.items():
        memory[token] = top
