"""Compiled steps against the interpreted program: token by token, in chunks, at any batch, with rows of different
lengths.
"""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from codegen_models import Shape, Step, capture
from torch import Tensor

from accelc.codegen import Options, compile_program
from accelc.codegen.errors import MutationError, StepIndexError, StepInputError

ops = torch.ops.accelc
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


class Routed(Step):
    """Parts that no kernel covers: a router, keys stored with time last, several outputs, views of outputs."""

    def forward(self, tokens: Tensor, positions: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        s = self.shape
        b, n = tokens.shape
        x = F.embedding(tokens, self.embedding)
        for i, w in enumerate(self.layers):
            y = self.norm_of(x, w.norm1)
            top, index = torch.softmax(F.linear(y, w.k).float(), -1).topk(2, -1)
            mixed = F.linear(y, w.v).gather(-1, index) * top.to(y.dtype)
            x = x + F.linear(F.linear(y, w.up), w.down) * mixed.sum(-1, keepdim=True)
            k = F.linear(y, w.k).view(b, n, s.kv_heads, s.head_dim).permute(0, 2, 3, 1)
            v = F.linear(y, w.v).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2)
            q = F.linear(y, w.q).view(b, n, s.heads, s.head_dim).transpose(1, 2)
            ops.cache_update(states[2 * i], k, lengths, 3)
            ops.cache_update(states[2 * i + 1], v, lengths, 2)
            a = ops.attention(
                q, states[2 * i].transpose(2, 3), states[2 * i + 1], positions, lengths, None, None, None, None,
                "causal", 0, s.head_dim**-0.5, 0.0,
            )  # fmt: skip
            x = x + F.linear(a.transpose(1, 2).reshape(b, n, s.heads * s.head_dim), w.o)
        return F.linear(x, self.embedding), torch.where(x > 0, x, 0.1 * x), x[:, -1], lengths + n

    def states(self, batch: int) -> list[Tensor]:
        s = self.shape
        keys, values = (s.head_dim, s.slots), (s.slots, s.head_dim)
        return [
            torch.zeros(batch, s.kv_heads, *size, dtype=s.dtype) for _ in range(s.layers) for size in (keys, values)
        ]


def arguments(shape: Shape, lengths: Tensor, fresh: int) -> list[Tensor]:
    tokens = torch.randint(0, shape.vocab, (len(lengths), fresh))
    return [tokens, lengths[:, None] + torch.arange(fresh)[None], lengths]


def graph_of(model: Step):
    return capture(model, [*arguments(model.shape, torch.zeros(2, dtype=torch.int64), 5), *model.states(2)])


KINDS = {
    "llama": lambda shape: Step(shape),
    "gpt2": lambda shape: Step(shape, plain=True),
    "routed": lambda shape: Routed(shape),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_interpreted_program(kind: str, dtype: torch.dtype) -> None:
    if kind == "routed" and dtype != torch.float32:
        pytest.skip("rounding may change which experts are chosen")
    shape = Shape(dtype=dtype)
    model = KINDS[kind](shape)
    batches = (2,) if kind == "routed" else (1, 2, 3)
    gm = graph_of(model)
    step = compile_program(gm, [*arguments(shape, torch.zeros(2, dtype=torch.int64), 5), *model.states(2)])
    assert bool(step.report.foreign) == (kind == "routed")
    for batch in batches:
        ours, theirs = model.states(batch), model.states(batch)
        lengths = torch.zeros(batch, dtype=torch.int64)
        pointers = [s.data_ptr() for s in ours]
        for fresh in (5, 1, 1, 40, 3, 1):
            given = arguments(shape, lengths, fresh)
            got, want = step(*given, *ours), step.interpret(*given, *theirs)
            for a, b in zip((*got, *ours), (*want, *theirs), strict=True):
                torch.testing.assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
            lengths = lengths + torch.randint(
                0, fresh + 1, (batch,)
            )  # rows accept different numbers, some are rolled back
        assert pointers == [s.data_ptr() for s in ours]


def test_outputs_belong_to_the_caller() -> None:
    model = Step(Shape())
    states = model.states(1)
    lengths = torch.zeros(1, dtype=torch.int64)
    first = arguments(model.shape, lengths, 1)
    step = compile_program(graph_of(model), [*first, *states])
    (kept,) = step(*first, *states)
    before = kept.clone()
    step(*arguments(model.shape, lengths + 1, 1), *states)
    assert torch.equal(kept, before)


def test_reads_weights_by_reference() -> None:
    """Tied weights stay one tensor, and an update of a weight is seen: nothing was copied or packed."""
    model = Step(Shape())
    states, given = model.states(1), arguments(model.shape, torch.zeros(1, dtype=torch.int64), 1)
    step = compile_program(graph_of(model), [*given, *states])
    before = step(*given, *states)[0].clone()
    model.embedding.data.mul_(2)
    after, want = step(*given, *states)[0], step.interpret(*given, *model.states(1))[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, want, atol=1e-5, rtol=1e-5)


def test_time_does_not_grow_with_the_capacity() -> None:
    """No copy of a cache in a step: 256 times the capacity, and steps as fast to well within the noise of the
    machine.
    """
    seconds = {}
    for slots in (256, 65536):
        shape = Shape(slots=slots)
        model = Step(shape)
        states, given = model.states(1), arguments(shape, torch.full((1,), 8), 1)
        step = compile_program(graph_of(model), [*given, *states])
        gc.collect()
        best = float("inf")
        for _ in range(200):
            started = time.perf_counter()
            step(*given, *states)
            best = min(best, time.perf_counter() - started)
        seconds[slots] = best
    assert seconds[65536] < 3 * seconds[256] + 1e-4  # a copy of these caches takes milliseconds


def test_one_call_at_a_time() -> None:
    model = Step(Shape())
    given = arguments(model.shape, torch.zeros(1, dtype=torch.int64), 1)
    step = compile_program(graph_of(model), [*given, *model.states(1)])
    want = step(*given, *model.states(1))[0].clone()
    wrong = []

    def work() -> None:
        states = model.states(1)
        for _ in range(50):
            if not torch.equal(step(*given, *states)[0], want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_step_is_the_call_whatever_runs_in_between(kind: str) -> None:
    model = KINDS[kind](Shape())
    step = compile_program(
        graph_of(model), [*arguments(model.shape, torch.zeros(1, dtype=torch.int64), 1), *model.states(1)]
    )
    runs = []
    for batch in (1, 1, 2):
        tokens, positions, lengths = arguments(model.shape, torch.zeros(batch, dtype=torch.int64), 1)
        inputs = (tokens, positions, lengths, *model.states(batch))
        reference = (tokens, positions, lengths, *model.states(batch))
        runs.append((step.bind(*inputs), inputs, reference))
    for turn in range(4):
        for bound, inputs, reference in runs:
            got = bound()
            want = step.interpret(*reference)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            inputs[0].add_(turn + 1).remainder_(model.shape.vocab)
            inputs[1].add_(1)
            inputs[2].add_(1)
        step(*arguments(model.shape, torch.zeros(1, dtype=torch.int64), 1), *model.states(1))
    kept = runs[0][0]()[0].clone()
    runs[1][0]()
    assert torch.equal(runs[0][0]()[0], kept)  # rows 0 and 1 have outputs of their own, and the inputs stood still
    with pytest.raises(StepInputError, match="6 inputs"):
        step.bind(*inputs[:-1])
    inputs[0].fill_(10**6)
    with pytest.raises(StepIndexError, match="token id"):
        bound()


def test_refuses_other_inputs_by_name() -> None:
    model = Step(Shape())
    states, given = model.states(1), arguments(model.shape, torch.zeros(1, dtype=torch.int64), 2)
    step = compile_program(graph_of(model), [*given, *states])
    with pytest.raises(StepInputError, match="tokens"):
        step(given[0].int(), *given[1:], *states)
    with pytest.raises(StepInputError, match="positions"):
        step(given[0], given[1][:, :1], given[2], *states)
    with pytest.raises(StepInputError, match="states_0"):
        step(*given, states[0].transpose(1, 2).contiguous().transpose(1, 2), *states[1:])
    with pytest.raises(StepInputError, match="6 inputs"):
        step(*given, *states[1:])
    with pytest.raises(StepIndexError, match="token id"):
        step(given[0] + 10**6, *given[1:], *states)
    with pytest.raises(StepIndexError, match="room"):
        step(given[0], given[1] + 100, given[2] + 127, *states)
    got, want = step(*given, *states)[0], step.interpret(*given, *model.states(1))[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_refuses_other_writes() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.add_.Tensor, (x, 1.0)),))
    with pytest.raises(MutationError, match="add_"):
        compile_program(torch.fx.GraphModule(torch.nn.Module(), graph), [torch.ones(3)])


def test_interpret_mode_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelc.codegen import native

    monkeypatch.setattr(native, "library", None)
    model = Step(Shape())
    states, given = model.states(1), arguments(model.shape, torch.zeros(1, dtype=torch.int64), 2)
    step = compile_program(graph_of(model), [*given, *states], options=Options(mode="interpret"))
    assert step(*given, *states)[0].shape == (1, 2, model.shape.vocab)
    assert "interpret" in step.report.notices[0]


def test_new_tensors_are_checked_whatever_their_id() -> None:
    """A loop makes its tokens anew each step, often where the last ones were: each is looked at."""
    model = Step(Shape())
    states, given = model.states(1), arguments(model.shape, torch.zeros(1, dtype=torch.int64), 2)
    step = compile_program(graph_of(model), [*given, *states])
    for _ in range(20):
        step(given[0].clone(), *given[1:], *states)
        with pytest.raises(StepInputError, match="tokens"):
            step(given[0].clone().to(torch.int16), *given[1:], *states)
    with pytest.raises(StepInputError, match="0 inputs"):
        step()
