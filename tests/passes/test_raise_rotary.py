"""Every spelling of rotary embedding becomes one operation that computes the same; what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from raising import WIDTH, calls, raised
from torch import Tensor

HEADS = 2
DIM = WIDTH // HEADS


def angles(x: Tensor, dim: int = DIM) -> Tensor:
    """[T, dim / 2]."""
    frequencies = 1.0 / 100 ** (torch.arange(0, dim, 2) / dim)
    return torch.arange(x.shape[1])[:, None] * frequencies


def heads(x: Tensor) -> Tensor:
    """[B, T, WIDTH] -> [B, H, T, D]."""
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def halves(x: Tensor, dim: int = DIM) -> Tensor:
    q = heads(x)
    cos, sin = (f(torch.cat([angles(x, dim)] * 2, -1)).to(x.dtype) for f in (torch.cos, torch.sin))
    turning, passing = q[..., :dim], q[..., dim:]
    a, b = turning[..., : dim // 2], turning[..., dim // 2 :]
    turned = turning * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, passing), -1) if dim < DIM else turned


def partial(x: Tensor) -> Tensor:
    return halves(x, DIM // 2)


def chunks(x: Tensor) -> Tensor:
    q = heads(x)
    cos, sin = (f(torch.cat([angles(x)] * 2, -1)).to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = q.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1) * sin + cos * q


def neighbours(x: Tensor) -> Tensor:
    q = heads(x)
    cos, sin = (f(angles(x)).to(x.dtype).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    turned = torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2)
    return q * cos + turned * sin


def half_tables(x: Tensor) -> Tensor:
    cos, sin = (f(angles(x)).to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = heads(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def half_tables_neighbours(x: Tensor) -> Tensor:
    cos, sin = (f(angles(x)).to(x.dtype) for f in (torch.cos, torch.sin))
    q = heads(x)
    a, b = q[..., ::2], q[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def neighbours_to_halves(x: Tensor) -> Tensor:
    cos, sin = (f(angles(x)).to(x.dtype) for f in (torch.cos, torch.sin))
    q = heads(x)
    a, b = q[..., ::2], q[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def complex_product(x: Tensor) -> Tensor:
    table = torch.polar(torch.ones_like(angles(x)), angles(x))  # [T, D / 2]
    pairs = torch.view_as_complex(heads(x).float().reshape(x.shape[0], HEADS, x.shape[1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spelling", "interleaved"),
    [
        (halves, False),
        (partial, False),
        (chunks, False),
        (neighbours, True),
        (half_tables, False),
        (half_tables_neighbours, True),
        (neighbours_to_halves, False),
        (complex_product, True),
    ],
)
def test_rotary(spelling: Callable[[Tensor], Tensor], interleaved: bool, dtype: torch.dtype) -> None:
    result = raised(spelling, "raise_rotary", dtype)
    assert result.matches == 1
    found = calls(result.program)
    assert found["accelc.rotary"] == 1
    assert not {"aten.neg", "aten.sub", "aten.stack", "aten.view_as_complex"} & set(found)
    (node,) = [n for n in result.program.graph.nodes if n.target is torch.ops.accelc.rotary.default]
    assert (node.args[3] if len(node.args) > 3 else False) is interleaved
    assert "nn_module_stack" in node.meta


def test_partial_rotary_leaves_the_concatenation() -> None:
    assert calls(raised(partial, "raise_rotary").program)["aten.cat"] == 2  # the table's, and the part that passes


def test_widened_tables_are_shared() -> None:
    result = raised(lambda x: half_tables(x) + half_tables(x * 2), "raise_rotary")
    assert result.matches == 2
    assert calls(result.program)["aten.cat"] == 2  # one for cosines, one for sines


def wrong_sign(x: Tensor) -> Tensor:
    q = heads(x)
    cos, sin = (f(torch.cat([angles(x)] * 2, -1)) for f in (torch.cos, torch.sin))
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((b, -a), dim=-1) * sin


def swapped_halves(x: Tensor) -> Tensor:
    q = heads(x)
    cos, sin = (f(torch.cat([angles(x)] * 2, -1)) for f in (torch.cos, torch.sin))
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((-a, b), dim=-1) * sin


def another_tensor(x: Tensor) -> Tensor:
    q = heads(x)
    cos, sin = (f(torch.cat([angles(x)] * 2, -1)) for f in (torch.cos, torch.sin))
    a, b = (q + 1).chunk(2, dim=-1)
    return q * cos + torch.cat((-b, a), dim=-1) * sin


def mixed_tables(x: Tensor) -> Tensor:
    cos, sin = (f(angles(x)) for f in (torch.cos, torch.sin))
    a, b = heads(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * sin + a * cos), dim=-1)


@pytest.mark.parametrize("spelling", [wrong_sign, swapped_halves, another_tensor, mixed_tables])
def test_what_is_no_rotation_stays(spelling: Callable[[Tensor], Tensor]) -> None:
    result = raised(spelling, "raise_rotary")
    assert result.matches == 0
    assert "accelc.rotary" not in calls(result.program)
