"""Products with a dequantized weight read its codes, in whatever way the product is spelled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from accelc.capture import capture
from accelc.ir.quantized import Scheme
from accelc.ir.rounding import round_to_nearest
from accelc.passes import Pipeline
from accelc.passes.normalise import Normalise
from accelc.passes.read_codes import ReadCodes
from accelc.quantized_linear import QuantizedLinear, QuantizedStack

ops = torch.ops.accelc
SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "linear": (lambda x, w: nn.functional.linear(x, w), 1),
    "matmul of the transpose": (lambda x, w: x @ w.T, 1),
    "mm": (lambda x, w: (x.reshape(-1, 32) @ w.transpose(0, 1)).reshape(x.shape), 1),
    "both ways": (lambda x, w: nn.functional.linear(x, w) + x @ w, 1),
    "as it lies": (lambda x, w: x @ w, 0),
    "not a product": (lambda x, w: x * w.sum(0), 0),
}


class Spelled(nn.Module):
    """Reads the weight of a quantized layer by itself."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 32)
        self.layer = QuantizedLinear(round_to_nearest(torch.randn(32, 32), Scheme.parse("int8:g32")))
        self.head = nn.Linear(32, 50)
        self.spelling = spelling

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(SPELLINGS[self.spelling][0](self.table(ids), self.layer.weight))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    forward = capture(Spelled(spelling).eval(), max_length=16)
    made = Pipeline([Normalise(), ReadCodes()]).run(forward)
    targets = [node.target for node in made.graph.nodes]
    assert targets.count(ops.quantized_linear.default) == made.history[-1].matches == SPELLINGS[spelling][1]
    assert (ops.dequantize.default in targets) == (spelling in ("both ways", "as it lies", "not a product"))
    ids = torch.randint(0, 50, (2, 7))
    torch.testing.assert_close(made.run(ids)[0], forward.run(ids)[0], atol=2e-3, rtol=2e-3)


class Batched(nn.Module):
    """Each expert multiplies every token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 32)
        self.stack = QuantizedStack(round_to_nearest(torch.randn(3, 48, 32), Scheme.parse("int4:g32")), torch.float32)
        self.head = nn.Linear(48, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        every = torch.bmm(x.reshape(1, -1, 32).expand(3, -1, -1), self.stack.weight.transpose(1, 2))  # [E, B T, N]
        return self.head(every.mean(0).reshape(*ids.shape, 48))


def test_stacks_in_a_batched_product() -> None:
    forward = capture(Batched().eval(), max_length=16)
    made = Pipeline([Normalise(), ReadCodes()]).run(forward)
    targets = [node.target for node in made.graph.nodes]
    assert ops.quantized_grouped_linear.default in targets
    assert ops.dequantize.default not in targets
    for shape in ((2, 7), (1, 3)):
        ids = torch.randint(0, 50, shape)
        torch.testing.assert_close(made.run(ids)[0], forward.run(ids)[0], atol=5e-3, rtol=5e-3)
