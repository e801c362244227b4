"""Settings for every test: thread counts, and no surprises from the machine's environment."""

import os

# Set before torch is imported. Under pytest-xdist each worker is one of several processes on few cores: one thread in
# each, and no pool of compile processes beside them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Nothing may be fetched from a model hub: models come from configurations with random weights.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Each test starts from the same random state, whatever ran before it in this process."""
    torch.manual_seed(0)
