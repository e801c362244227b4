"""RecogniseMasks: families read off evaluated biases, and nothing recognised that is not one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelc.passes.recognise_masks import probe_positions, recognise

LENGTH, ROWS, HEADS = 70, 24, 3


def _grid(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return positions[:, None], torch.arange(LENGTH)[None, :]


def _positions() -> torch.Tensor:
    return probe_positions(LENGTH, ROWS)


def test_probes_reach_both_ends() -> None:
    positions = _positions()
    assert positions[0] == 0
    assert positions[-1] == LENGTH - 1
    assert len(positions) <= ROWS
    assert torch.equal(probe_positions(5, ROWS), torch.arange(5))


@given(
    family=st.sampled_from(["causal", "window", "chunk"]), size=st.integers(1, LENGTH - 1), spelled=st.integers(0, 3)
)
@settings(deadline=None, max_examples=60)
def test_masks_are_recognised_however_they_are_spelled(family: str, size: int, spelled: int) -> None:
    positions = _positions()
    query, key = _grid(positions)
    allowed = key <= query
    if family == "window":
        allowed = allowed & (query - key < size)
    if family == "chunk":
        allowed = allowed & (query // size == key // size)
    if spelled == 0:
        bias = allowed
    elif spelled == 1:
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    elif spelled == 2:
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    else:  # later keys are hidden by structure anyway, so a mask may say anything about them
        bias = allowed | (key > query)
    found = recognise(bias[None, None], positions, LENGTH)
    assert found is not None
    assert found.slopes is None
    seen = key <= query
    if found.mask == "window":
        seen = seen & (query - key < found.window)
    if found.mask == "chunk":
        seen = seen & (query // found.window == key // found.window)
    assert torch.equal(seen, allowed), f"{family} {size} was taken for {found}"


@given(constant=st.sampled_from(["none", "row", "key position"]), window=st.sampled_from([0, 9]))
@settings(deadline=None, max_examples=12)
def test_alibi_slopes_up_to_a_constant_a_row(constant: str, window: int) -> None:
    positions = _positions()
    query, key = _grid(positions)
    slopes = torch.tensor([0.5, 0.25, 0.0625])
    distance = (key - query).float()[None]
    if constant == "row":
        distance = distance + query[None]  # slope * key position, as Bloom has it
    if constant == "key position":
        distance = distance + query[None] - LENGTH + 1  # counted from the end, as MPT has it
    bias = slopes[:, None, None] * distance
    hidden = key > query
    if window:
        hidden = hidden | (query - key >= window)
    found = recognise(bias.masked_fill(hidden, float("-inf"))[None], positions, LENGTH)
    assert found is not None
    assert (found.mask, found.window) == (("window", window) if window else ("causal", 0))
    torch.testing.assert_close(found.slopes, slopes, rtol=1e-4, atol=0)


@pytest.mark.parametrize("change", ["one pair", "one value", "root of the distance", "heads see different keys"])
def test_what_is_no_family_stays_a_tensor(change: str) -> None:
    positions = _positions()
    query, key = _grid(positions)
    bias = torch.zeros(HEADS, len(positions), LENGTH).masked_fill(key > query, float("-inf"))
    if change == "one pair":
        bias[:, -1, 3] = float("-inf")
    if change == "one value":
        bias[1, -1, 3] = 0.01
    if change == "root of the distance":
        bias = bias - (query - key).clamp(min=0).float().sqrt()
    if change == "heads see different keys":
        bias[1] = bias[1].masked_fill(query - key >= 7, float("-inf"))
    assert recognise(bias[None], positions, LENGTH) is None
