"""Repeated steps: they do what asked ones would, and only steps that may be repeated are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES
from random_heads import heads_of
from torch import Tensor

import accelc
from accelc.functions import compile_function
from accelc.heads.modules import MEDUSA
from accelc.runtime.clock import HostClock
from accelc.runtime.functions import Functions, TensorFunction, put
from accelc.runtime.speculation import generation, replay, token_recycling
from accelc.runtime.speculation.choice import SizeChooser
from accelc.runtime.speculation.draft import Accepted, Draft
from accelc.runtime.speculation.outcome import Outcome
from accelc.runtime.speculation.replay import EndOfPart, Replay, Result
from accelc.runtime.speculation.statistics import Recorder
from accelc.runtime.speculation.trees import RECYCLING, Layout, Tree

PROMPTS = [torch.arange(3, 17) % 9 + 3, torch.tensor([5, 6, 5, 6, 5]), torch.arange(40, 60)]
NEW_TOKENS = 120

DRAFTERS: dict[str, Callable[[accelc.CompiledDecoder], Any]] = {
    "prompt_lookup": lambda decoder: accelc.PromptLookup(tokens=6),
    "token_recycling": lambda decoder: accelc.TokenRecycling(RECYCLING.cut(12)),
    "medusa": lambda decoder: heads_of(decoder, MEDUSA, prefix=False),
    "hydra": lambda decoder: heads_of(decoder, prefix=False),
    "hydra with a prefix layer": heads_of,
}


class InTurn(SizeChooser):
    """Sizes long enough for steps to be repeated, and plain steps between them."""

    sizes_in_turn = (7,) * 30 + (1,) * 2 + (7,) * 20 + (4,) * 25 + (1,) * 3

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.size = self.sizes_in_turn[0]

    def add(self, paths: Sequence[Sequence[int]], seconds: float | None) -> None:
        self._step += 1
        self.size = self.sizes_in_turn[self._step % len(self.sizes_in_turn)]

    def add_plain(self, seconds: float) -> None:
        self.add((), seconds)


@pytest.fixture(scope="module")
def decoder() -> accelc.CompiledDecoder:
    return accelc.compile(FAMILIES["llama"].build(), max_length=200, cache=False)


def unlearn(decoder: accelc.CompiledDecoder) -> None:
    """Token Recycling learns from what it decoded."""
    for source, _ in decoder.speculator._sources.values():
        if isinstance(source, token_recycling._Source):
            source._proposer._successors.zero_()


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """What the host was told of each step of the generations so far."""
    told: list[list[list[int]]] = []
    add = Recorder.add

    def noted(self: Recorder, layout: Layout, outcome: Outcome, *rest: Any) -> None:
        told.append(outcome.rows)
        add(self, layout, outcome, *rest)

    monkeypatch.setattr(Recorder, "add", noted)
    return told


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step so far, whether it was repeated."""
    found: list[bool] = []
    run = Replay.run

    def noted(self: Replay, size: int, step: Any) -> Any:
        asked = []

        def watched(end_of_part: EndOfPart) -> Any:
            asked.append(True)
            return step(end_of_part)

        result = run(self, size, watched)
        found.append(not asked)
        return result

    monkeypatch.setattr(Replay, "run", noted)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("rows", "nodes"),
    [
        pytest.param(1, 7, id="one row, one size"),
        pytest.param(3, None, id="three rows, sizes in turn"),
        pytest.param(1, None, id="one row, sizes in turn", marks=pytest.mark.slow),
        pytest.param(3, 7, id="three rows, one size", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_repeated_steps_do_what_asked_ones_do(
    decoder: accelc.CompiledDecoder,
    drafter: str,
    rows: int,
    temperature: float,
    nodes: int | None,
    outcomes: list[list[list[int]]],
    repeated: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts, paths, tokens of every step, of rows that end at different times."""
    monkeypatch.setattr(generation, "SizeChooser", InTurn)
    results = []
    for tries in (0, replay.TRIES):
        monkeypatch.setattr(replay, "TRIES", tries)
        unlearn(decoder)
        outcomes.clear()
        repeated.clear()
        draft = DRAFTERS[drafter](decoder)
        sampling = accelc.SamplingParams(temperature=temperature)
        given = {"draft": draft, "draft_nodes": nodes, "ignore_eos": True, "stop_tokens": 22, "sampling": sampling,
                 "seed": 5}  # fmt: skip
        got = decoder.generate(PROMPTS[:rows], max_new_tokens=NEW_TOKENS, **given)
        results.append(([row.tolist() for row in got.tokens], list(outcomes)))
        assert any(repeated) == (tries > 0)
    assert results[0] == results[1]


# -- what is repeated --------------------------------------------------------------------------------------------------

LAYOUT = Tree.chain(1).layout()


def increased(count: Tensor) -> tuple[Tensor]:
    more = count + 1
    put(count, more)
    return (more,)


class Steps:
    """Steps that count how often they are asked, and in a tensor how often they run."""

    def __init__(self, call: Functions) -> None:
        self.call, self.asked = call, 0
        self.function: TensorFunction = increased
        self.count = torch.zeros(1, 1, dtype=torch.int64)
        self.draft = Draft(torch.zeros(1, 2, dtype=torch.int64), LAYOUT)
        self.accepted = Accepted(*(torch.zeros(1, dtype=torch.int64) for _ in range(4)))
        self.besides: Callable[[], object] = lambda: None

    def __call__(self, end_of_part: EndOfPart) -> Result:
        self.asked += 1
        (result,) = self.call(self.function, self.count)
        self.besides()
        for _ in range(4):
            end_of_part()
        return Result(self.draft, self.accepted, result)


@pytest.fixture
def steps() -> Steps:
    return Steps(Functions(compile_function))


def run(steps: Steps, sizes: Sequence[int], *, repeatable: bool = True) -> int:
    """How often steps of these sizes in turn are asked, 0 being a token without a tree."""
    replayed = Replay(steps.call, HostClock(), repeatable=repeatable)
    for size in sizes:
        if size == 0:
            replayed.forget()
            continue
        (*_, result), marks = replayed.run(size, steps)
        assert len(marks) == 5
        assert result.is_inference() or result.shape == (1, 1)
    assert int(steps.count) == len([size for size in sizes if size])
    return steps.asked


def test_steps_are_repeated_once_two_are_the_same(steps: Steps) -> None:
    """The first two calls bind the function, the next two are the same."""
    assert run(steps, [5] * 20) == 4


def test_another_size_is_asked_for(steps: Steps) -> None:
    assert run(steps, [5] * 10 + [6] * 10) == 4 + 2
    assert steps.asked == 6


def test_a_token_without_a_tree_is_asked_for(steps: Steps) -> None:
    assert run(steps, [5] * 10 + [0] + [5] * 10) == 4 + 2


def test_a_drafter_must_allow_it(steps: Steps) -> None:
    assert run(steps, [5] * 20, repeatable=False) == 20


@pytest.mark.parametrize(
    "besides",
    [
        lambda: torch.ones(2) + 1,
        lambda: torch.zeros(3).tolist(),
        lambda: LAYOUT.depths[0],
        lambda: torch.zeros(1).numpy(),
    ],
    ids=["sum", "tolist", "view", "numpy"],
)
def test_what_torch_does_besides_is_not_repeated(steps: Steps, besides: Callable[[], object]) -> None:
    steps.besides = besides
    assert run(steps, [5] * 40) == 40


def test_sizes_of_tensors_may_be_asked_for(steps: Steps) -> None:
    steps.besides = lambda: (steps.count.shape, len(steps.count), steps.count.dtype, steps.count.device)
    assert run(steps, [5] * 20) == 4


def test_calls_that_differ_are_not_repeated(steps: Steps) -> None:
    """Of a step that does something else each second time."""
    other = torch.zeros(1, 1, dtype=torch.int64)

    def now_and_then() -> None:
        if steps.asked % 2:
            steps.call(increased, other)

    steps.besides = now_and_then
    assert run(steps, [5] * 40) == 40


def test_programs_that_torch_has_a_part_in_are_not_repeated(steps: Steps) -> None:
    """What torch computes inside of a compiled function is written to other memory each time."""

    def without_kernel(count: Tensor) -> tuple[Tensor]:
        more = torch.special.i0e(count.float()).long() + count + 1 - torch.special.i0e(count.float()).long()
        put(count, more)
        return (more,)

    steps.function = without_kernel
    assert run(steps, [5] * 40) == 40


def test_results_that_are_made_anew_are_not_repeated(steps: Steps) -> None:
    def renewed() -> None:
        steps.draft = Draft(steps.draft.tokens, LAYOUT)  # the same tensors
        steps.accepted = Accepted(*[t.detach() for t in (steps.accepted.node,) * 4])

    steps.besides = renewed
    assert run(steps, [5] * 40) == 40


@pytest.mark.parametrize(
    ("accept", "sampling"),
    [
        ("rejection", accelc.SamplingParams(temperature=0.8)),
        ("matching", accelc.SamplingParams(temperature=0.8, repetition_penalty=1.2)),
        ("matching", accelc.SamplingParams(repetition_penalty=1.2)),
    ],
    ids=str,
)
def test_what_torch_computes_of_a_step_keeps_it_from_being_repeated(
    decoder: accelc.CompiledDecoder, accept: str, sampling: accelc.SamplingParams, repeated: list[bool]
) -> None:
    given = {"draft": accelc.PromptLookup(tokens=4), "draft_nodes": 5, "accept": accept, "ignore_eos": True}
    decoder.generate(PROMPTS[0], max_new_tokens=60, sampling=sampling, seed=1, **given)
    assert repeated
    assert not any(repeated)
