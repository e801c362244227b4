"""The size of trees follows what steps cost and what drafts are worth."""

import random

import pytest

from accelc.runtime.speculation.choice import Acceptance, SizeChooser, StepTimes


def decode(chooser: SizeChooser, seconds: dict[int, float], accepted: float, steps: int, seed: int = 0) -> list[int]:
    """Sizes of `steps` steps along a chain whose next token is right with a probability."""
    chance, sizes = random.Random(seed), []
    for _ in range(steps):
        length = 0
        while length < chooser.size - 1 and chance.random() < accepted:
            length += 1
        sizes.append(chooser.size)
        chooser.add([list(range(length + 1))], seconds[chooser.size] * chance.uniform(0.9, 1.1))
    return sizes


def times(free: int, size: int = 48) -> dict[int, float]:
    """Seconds of a step that waits for the memory up to `free` nodes, then takes as much longer as it has more."""
    return {n: 0.1 * max(1.0, n / free) for n in range(1, size + 1)}


@pytest.mark.parametrize(
    ("accepted", "free", "wanted"),
    [
        (0.0, 1, {1}),
        (0.05, 2, {1, 3}),
        (0.9, 24, {24, 48}),
        (0.6, 6, {3, 6}),
        (0.98, 4, {6, 12}),
        (0.5, 48, {6, 12, 24, 48}),
    ],
)
def test_the_best_size_wins(accepted: float, free: int, wanted: set[int]) -> None:
    sizes = decode(SizeChooser(StepTimes(), 1, 48), times(free), accepted, 300)
    late = sizes[150:]
    assert sum(size in wanted for size in late) > 0.9 * len(late), (sizes[:40], late)


def test_what_is_measured_serves_the_next_generation() -> None:
    known = StepTimes()
    decode(SizeChooser(known, 1, 48), times(2), 0.3, 200)
    sizes = decode(SizeChooser(known, 1, 48), times(2), 0.3, 60, seed=1)
    assert not {12, 24, 48} & set(sizes)


def test_a_drafter_that_was_never_right_is_not_believed_again() -> None:
    known, acceptance = StepTimes(), Acceptance(48)
    decode(SizeChooser(known, 1, 48, acceptance), times(2), 0.0, 200)
    assert set(decode(SizeChooser(known, 1, 48, acceptance), times(2), 0.0, 60, seed=1)) == {1}
    assert acceptance.met.max() <= 60  # an older text counts for little
    assert decode(SizeChooser(known, 1, 48, acceptance), times(2), 0.95, 1000)[-1] >= 3  # but tried, later


def test_a_text_that_changes() -> None:
    chooser = SizeChooser(StepTimes(), 1, 48)
    assert decode(chooser, times(2), 0.95, 200)[-1] in (3, 6)
    assert decode(chooser, times(2), 0.0, 300)[-1] == 1


def test_a_step_that_stumbles_is_not_believed() -> None:
    known = StepTimes()
    for seconds in (5.0, 0.1, 0.1, 9.0, 0.1):
        known.add(1, 6, seconds)
    time = known.known(1, 6)
    assert time is not None
    assert 0.1 <= time < 0.12
    assert known.known(2, 6) is None
