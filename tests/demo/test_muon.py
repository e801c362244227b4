"""The demo's optimizer against torch's own, and what its update is."""

from __future__ import annotations

import pytest
import torch

from accelc.demo.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(12, 12), (8, 24), (24, 8)])
def test_updates_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape), torch.float32))
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.4


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32)])
def test_steps_as_torch_does_but_for_its_bf16(shape: tuple[int, int]) -> None:
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.01}
    optimizers = [Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for seed in range(4):
        for p in (ours, theirs):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.step()
    ours, theirs = ours.detach(), theirs.detach()
    moved = (theirs - start).norm()
    assert float((ours - theirs).norm() / moved) < 0.02
    assert float((ours - start).norm()) > 0.5 * float(moved)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
