"""DraftHeads: inserted heads compute what they do alone, from the row of hidden states that is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from accelc.heads.graph import capture_module
from accelc.ir import Program
from accelc.ir.errors import PassError
from accelc.ir.program import graph_module
from accelc.ir.shapes import INPUTS, propagate
from accelc.passes import Pipeline
from accelc.passes.draft_heads import DraftHeads
from accelc.passes.quantize_weights import QuantizeWeights
from accelc.passes.tap_hidden import HIDDEN

WIDTH = 64


class Heads(nn.Module):
    """Two linear layers, whose best tokens stand behind the root."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 96, bias=False)

    def forward(self, hidden: Tensor, root: Tensor) -> tuple[Tensor, ...]:
        scores = self.out(self.inner(hidden).relu())
        return torch.cat([root, torch.ops.accelc.top_k(scores, 3).flatten(1)], dim=1), scores


@pytest.fixture(scope="module")
def heads() -> Heads:
    torch.manual_seed(0)
    return Heads().eval()


def hidden_states() -> Program:
    graph = torch.fx.Graph()
    graph.output((graph.placeholder(HIDDEN),))
    program = Program("hidden", graph_module(nn.Module(), graph), (HIDDEN,), (HIDDEN,))
    program.facts[INPUTS] = {HIDDEN: (("B", "N", WIDTH), torch.float32)}
    return program


def captured(heads: Heads) -> Program:
    examples = {HIDDEN: torch.zeros(2, 1, WIDTH), "root": torch.zeros(2, 1, dtype=torch.int64)}
    return capture_module(heads, examples, ("tokens", "scores"), time=None, name="heads")


def test_inserted_heads_read_the_row_that_is_asked_for(heads: Heads) -> None:
    made = Pipeline([DraftHeads(captured(heads))]).run(hidden_states())
    assert (made.inputs, made.outputs) == ((HIDDEN, "last", "root"), ("tokens", "scores"))
    assert made.history[-1].matches == 2
    for batch, count in ((1, 1), (3, 5)):
        hidden, root = torch.randn(batch, count, WIDTH), torch.randint(0, 96, (batch, 1))
        last = torch.randint(0, count, (batch,))
        tokens, scores = made.run(hidden, last, root)
        with torch.no_grad():
            wanted = heads(hidden[torch.arange(batch), last][:, None], root)
        assert torch.equal(tokens, wanted[0])
        torch.testing.assert_close(scores, wanted[1])
    propagate(made)
    assert made.output_node("tokens").meta["val"].shape[1] == 4


def test_heads_are_quantized_like_any_linear_layer(heads: Heads) -> None:
    made = Pipeline([DraftHeads(captured(heads)), QuantizeWeights(scheme="int8")]).run(hidden_states())
    targets = [node.target for node in made.graph.nodes]
    assert targets.count(torch.ops.accelc.quantized_linear.default) == 2
    assert torch.ops.aten.linear.default not in targets


def test_without_heads_or_hidden_states_it_says_so(heads: Heads) -> None:
    with pytest.raises(PassError, match="needs heads"):
        Pipeline([DraftHeads()]).run(hidden_states())
    with pytest.raises(PassError, match="returns tokens, scores"):
        Pipeline([DraftHeads(captured(heads))]).run(captured(heads))
