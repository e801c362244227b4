"""The small decoder that the runtime tests run."""

import pytest
import torch
from tiny_decoder import Tiny


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Shapes are tiny: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()
