"""The profile of a step: every instruction is counted, and bytes are those that a step must move."""

from __future__ import annotations

import pytest
import torch
from codegen_models import Shape, Step, capture

from accelc.codegen import CompiledStep, Options
from accelc.codegen.step import step_dims


def compiled(mode: str = "compile") -> tuple[CompiledStep, list[torch.Tensor], Shape]:
    model = Step(Shape())
    inputs = [torch.zeros(2, 3, dtype=torch.long), torch.arange(3).expand(2, 3).contiguous(), torch.zeros(2).long()]
    gm = capture(model, [*inputs, *model.states(2)])
    inputs = [torch.tensor([[1]]), torch.tensor([[9]]), torch.tensor([9]), *model.states(1)]
    return CompiledStep(gm, inputs, step_dims(gm), Options(mode=mode)), inputs, model.shape


def test_profile_adds_up() -> None:
    step, inputs, shape = compiled()
    want = step(*inputs)[0]
    profile = step.profile(*inputs, repeats=5)
    torch.testing.assert_close(step(*inputs)[0], want)  # profiling leaves the step as it was
    rows = {row.instruction: row for row in profile.rows}
    head = rows[f"linear {shape.vocab}x{shape.hidden}"]
    assert head.calls == 1
    assert head.bytes == 4 * (shape.vocab * shape.hidden + shape.hidden + shape.vocab)
    attention = next(row for row in profile.rows if row.instruction.startswith("attention"))
    rows_seen = 10 * 2 * shape.kv_heads * shape.head_dim  # nine committed and the new one, keys and values
    assert attention.bytes == 4 * shape.layers * (rows_seen + 2 * shape.heads * shape.head_dim)
    parts = sum(row.seconds for row in profile.rows) + profile.waiting + profile.outside
    assert parts == pytest.approx(profile.seconds)
    assert profile.outside > 0
    assert head.instruction in profile.text()


def test_interpreted_step_has_no_profile() -> None:
    step, inputs, _ = compiled("interpret")
    with pytest.raises(ValueError, match="interpreted"):
        step.profile(*inputs)
