"""A forward that cannot be captured ends in one error that names the line of the model, and prints nothing."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from accelc.capture import capture
from accelc.capture_failure import SHAPES_LOG
from accelc.ir.errors import AccelcError, CaptureError


class Inner(nn.Module):
    """A submodule that applies a function to the ids and the hidden states [B, T, 16]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mask", torch.zeros(32, 32))  # as large as the longest sequence of the tests

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.function(self, ids, x)  # type: ignore[call-arg]


class Model(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)
        self.inner = Inner(function)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(ids, self.token(ids)))


def branches(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x


def counts(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return x + torch.arange(int(ids.max())).sum()


def loops(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    out = [torch.tanh(x[:, step]) for step in range(ids.shape[1])]
    return torch.stack(out, 1)


def recurs(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return inner.recurrent(x)[0]


def selects(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return x + x[ids > 3].mean()


def fixes_length(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return x * torch.ones(7, 1)


def fixes_batch(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return x.reshape(2, -1, 16)


def bounds_length(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    assert ids.shape[1] <= 20
    return x


def branches_on_length(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    x = x + inner.mask[: ids.shape[1], : ids.shape[1]].sum()
    return x if ids.shape[1] < 20 else -x


def leaves_torch(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return x + torch.from_numpy(ids.numpy())[..., None]


def raises(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return x + {}["missing"]


def writes(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    inner.calls += 1
    return x * inner.calls


def runs_another_graph(inner: Inner, ids: Tensor, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,))


CALL = "self.function(self, ids, x)"
"""What torch keeps of the stack with a captured operation: the innermost forward."""

CASES = {
    branches: ("depends on values of tensors", "if x.sum() > 0", "torch.where"),
    counts: ("depends on values of tensors", "int(ids.max())", "torch.where"),
    loops: ("length == 7", "for step in range(ids.shape[1])", "loop over the tokens"),
    recurs: ("length == 7", "inner.recurrent (GRU)", "nn.GRU"),
    selects: ("aten.index.Tensor", CALL, "torch.where"),
    fixes_length: ("length == 7", "x * torch.ones(7, 1)", "ids.shape"),
    fixes_batch: ("batch", "x.reshape(2, -1, 16)", "ids.shape"),
    bounds_length: ("length <= 20", "assert ids.shape[1] <= 20", "ids.shape"),
    branches_on_length: ("length < 20", "if ids.shape[1] < 20", "ids.shape"),
    leaves_torch: ("numpy", "torch.from_numpy", "tensor operations"),
    raises: ("KeyError: 'missing'", '{}["missing"]', "tensor operations"),
    writes: ("writes to its buffers: inner.calls", "", "from the ids"),
    runs_another_graph: ("cond", CALL, "torch.where"),
}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_the_line_is_named_and_nothing_is_printed(function: object, capfd: pytest.CaptureFixture[str]) -> None:
    what, where, remedy = CASES[function]  # type: ignore[index]
    with pytest.raises(CaptureError) as raised:
        capture(Model(function).eval(), max_length=32)
    error = raised.value
    assert what in error.what
    assert where in error.where
    assert remedy in error.remedy
    assert "inner (Inner), " in error.where or where in (CALL, "", "inner.recurrent (GRU)")
    assert len(str(error)) < 800
    assert "".join(capfd.readouterr()) == ""


def test_a_forward_within_its_bounds_is_captured() -> None:
    """The assertion that fails at 32 tokens holds for 20: nothing is refused that works."""
    model = Model(bounds_length).eval()
    program = capture(model, max_length=20)
    ids = torch.randint(31, (3, 19))
    torch.testing.assert_close(program.run(ids)[0], model.head(model.token(ids)))


def test_listening_leaves_torchs_log_as_it_was() -> None:
    logger = logging.getLogger(SHAPES_LOG)
    before = logger.level, list(logger.filters)
    with pytest.raises(AccelcError):
        capture(Model(loops).eval(), max_length=32)
    assert (logger.level, list(logger.filters)) == before
