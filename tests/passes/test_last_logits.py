"""LastLogits: one row of logits, chosen before the output projection, states written all the same."""

import pytest
import torch
from families import FAMILIES

from accelc.capture import capture
from accelc.ir import Program
from accelc.passes import Pipeline
from accelc.passes.last_logits import LastLogits
from accelc.pipeline import step_pipeline


def _programs(name: str) -> tuple[Program, Program]:
    step = step_pipeline().run(capture(FAMILIES[name].build(), max_length=48))
    return step, Pipeline([LastLogits()]).run(step)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_one_row_of_logits_and_the_same_states(name: str) -> None:
    step, prefill = _programs(name)
    assert prefill.inputs == ("tokens", "positions", "lengths", "last")
    tokens = torch.randint(3, 90, (3, 7))
    positions, lengths = torch.arange(7).expand(3, 7), torch.zeros(3, dtype=torch.int64)
    last = torch.tensor([6, 0, 3])
    first = [s.allocate(3, 16) for s in step.states]
    second = [s.allocate(3, 16) for s in step.states]
    expected = step.run(tokens, positions, lengths, *first)[0]
    got = prefill.run(tokens, positions, lengths, last, *second)[0]
    assert got.shape == (3, 1, expected.shape[-1])
    torch.testing.assert_close(got[:, 0], expected[torch.arange(3), last])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_choice_stands_before_the_output_projection() -> None:
    """Gemma 2 caps its logits, so the projection is not the last operation; it must still see one token a row."""
    _, prefill = _programs("gemma2")
    nodes = [str(n.target) for n in prefill.graph.nodes if n.op == "call_function"]
    chosen = max(i for i, t in enumerate(nodes) if t == "aten.index.Tensor")
    assert "aten.linear.default" in nodes[chosen:]
    assert "aten.tanh.default" in nodes[chosen:]
