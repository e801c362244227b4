"""TapHidden: what it taps are the last hidden states of the model, in a forward, a step and a prefill."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from raising import WIDTH, Around
from torch import nn

from accelc.capture import capture
from accelc.ir.errors import PassError
from accelc.passes import Pipeline
from accelc.passes.last_logits import LastLogits
from accelc.passes.tap_hidden import TapHidden
from accelc.pipeline import step_pipeline


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere", "bloom"])
def test_it_is_what_transformers_calls_the_last_hidden_state(name: str) -> None:
    model = FAMILIES[name].build()
    tapped = Pipeline([TapHidden()]).run(capture(model, max_length=48))
    assert tapped.outputs == ("logits", "hidden")
    ids = torch.randint(3, FAMILIES[name].vocabulary, (2, 9))
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(tapped.run(ids)[1], expected, atol=1e-5, rtol=1e-4)


def test_steps_and_prefills_give_all_rows_of_it() -> None:
    model = FAMILIES["llama"].build()
    step = Pipeline([TapHidden()]).run(step_pipeline().run(capture(model, max_length=48)))
    prefill = Pipeline([LastLogits()]).run(step)
    assert prefill.outputs == ("logits", "hidden")
    ids = torch.randint(3, 90, (2, 9))
    positions, lengths = torch.arange(9).expand(2, 9), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
    for program, last in ((step, ()), (prefill, (torch.tensor([8, 2]),))):
        states = [spec.allocate(2, 64) for spec in program.states]
        logits, hidden = program.run(ids, positions, lengths, *last, *states)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)
        assert logits.shape[1] == (1 if last else 9)
    nodes = [str(n.target) for n in prefill.graph.nodes if n.op == "call_function"]
    assert "aten.linear.default" in nodes[nodes.index("aten.index.Tensor") :], "one row is chosen before the projection"


def test_it_runs_once_and_where_logits_are_linear() -> None:
    forward = capture(Around(nn.Linear(WIDTH, 31)), max_length=16)
    tapped = Pipeline([TapHidden()]).run(forward)
    with pytest.raises(PassError, match="already"):
        Pipeline([TapHidden()]).run(tapped)
    with pytest.raises(PassError, match="linear layer"):
        Pipeline([TapHidden()]).run(capture(Squared(), max_length=16))


class Squared(nn.Module):
    """Logits are squares of what the linear layer gives: a scale from token to token, which is no plain projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Around(nn.Linear(WIDTH, 31))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids).square().cumsum(1)
