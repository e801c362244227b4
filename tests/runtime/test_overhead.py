"""What the framework adds to a batch-1 greedy step, measured with a step that does nothing."""

import torch

from accelc.ir.state import StateSpec
from accelc.runtime import Decoder

LIMIT = 60e-6
"""Seconds per step, selection included."""


def test_overhead_per_step():
    """The least of several runs, so that other work on the machine does not decide."""
    logits = torch.randn(1, 1, 32000)
    states = [StateSpec(f"s{i}", ("B", 1, "S", 2), torch.float32, 2) for i in range(64)]
    decoder = Decoder(lambda *_: (logits,), None, states, max_length=600, vocab_size=32000)

    def seconds_per_step():
        stats = decoder.generate([1], max_new_tokens=500).statistics
        return (stats.total_seconds - stats.first_token_seconds) / stats.steps

    assert min(seconds_per_step() for _ in range(20)) < LIMIT
