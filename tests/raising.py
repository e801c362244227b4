"""What the tests of the raise passes share: small programs, counts of calls, comparison before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from accelc.capture import capture
from accelc.ir import Program, check
from accelc.passes.base import PassResult
from accelc.passes.registry import build_pass

VOCABULARY = 31
WIDTH = 16


class Around(nn.Module):
    """ids [B, T] -> an embedding [B, T, WIDTH] -> `body`, which may own parameters -> logits.

    The body returns [B, T, ...], or [B, H, T, D] which becomes [B, T, H * D].
    """

    def __init__(self, body: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        y = self.body(self.embedding(ids))
        return y if y.dim() == 3 else y.transpose(1, 2).flatten(-2)


def normalised(model: nn.Module) -> Program:
    """The model as a normalised forward program."""
    return with_passes(capture(model.eval(), max_length=64), ["normalise"])[-1].program


def with_passes(program: Program, names: Sequence[str]) -> list[PassResult]:
    """The results of running the named passes one after another; what each ensures is written down, and checked."""
    results = []
    for name in names:
        step = build_pass(name)
        result = step.run(program)
        program = result.program
        program.facts.update(dict.fromkeys(step.ensures, True))
        check(program)
        results.append(result)
    return results


def raised(body: nn.Module | Callable[[Tensor], Tensor], name: str, dtype: torch.dtype = torch.float32) -> PassResult:
    """Run one pass on a program around `body` and require that the program computes what it did, up to rounding."""
    torch.manual_seed(0)
    before = normalised(Around(body).to(dtype))
    result = with_passes(before, [name])[0]
    assert_same(before, result.program)
    return result


def assert_same(
    before: Program, after: Program, vocabulary: int = VOCABULARY, rounding: torch.dtype | None = None
) -> None:
    """Both programs give the same logits at a batch of three and a length that was not the traced one.

    Up to rounding to `rounding`, by default the dtype of the logits.
    """
    ids = torch.randint(3, vocabulary, (3, 19), generator=torch.Generator().manual_seed(1))
    (want,), (got,) = before.run(ids), after.run(ids)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert want.float().std() > 0  # not a constant, which anything equals
    tolerance = 2e-5 if (rounding or want.dtype) == torch.float32 else 2e-2
    scale = float(want.float().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale)


def calls(program: Program) -> Counter[str]:
    """How often each operator is called: "accelc.rotary", "aten.mul", ..."""
    targets = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return Counter(str(t.overloadpacket) for t in targets)
