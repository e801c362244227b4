"""Short comparisons on five tokens, for steps whose programs have passed the whole check before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from accelc.capture import forward_logits
from accelc.ir import Program
from accelc.ir.errors import CheckError
from accelc.passes.closeness import allowed, comparable, computing_dtype, has_peaks, spread, what_is_not_finite
from accelc.watch import tensors_of


def confirm(model: nn.Module, step: Program, run: Callable[..., Any], capacity: int) -> bool:
    """Whether a cached step computes the logits of the model as it is now, for five tokens in two chunks. Raises
    NonFiniteLogitsError where those are no numbers.
    """
    tokens = confirming_tokens(step)
    expected = comparable(forward_logits(model, tokens))
    if not has_peaks(expected):
        raise what_is_not_finite(dict(tensors_of(model)))
    difference = float((run_in_chunks(step, run, tokens, capacity) - expected).abs_().max())
    return difference <= allowed(computing_dtype(step)) * spread(expected)  # NaN is no agreement


def confirm_compiled(step: Program, run: Callable[..., Any], capacity: int, activation_bits: int = 16) -> None:
    """Raise CheckError unless a step whose weights were quantized after its check computes, when compiled, what its
    graph does. Kernels round activations, so fp32 models are allowed their share of that.
    """
    tokens = confirming_tokens(step)
    expected = run_in_chunks(step, step.run, tokens, capacity)
    error = float((run_in_chunks(step, run, tokens, capacity) - expected).abs_().max()) / spread(expected)
    bound = max(allowed(computing_dtype(step)), 5e-3 if activation_bits == 16 else 0.2)
    if not error <= bound:
        raise CheckError(
            f"the compiled quantized step differs from its graph: {error:.2e} of the logits' spread "
            f"(allowed {bound:.0e})",
            remedy=""
            if activation_bits == 16
            else "Inputs of products in 8 bits may turn choices of experts: leave out activation_bits=8.",
        )


def confirming_tokens(step: Program) -> torch.Tensor:
    """Five random tokens [1, 5]."""
    vocabulary = int(step.facts["capture"]["input_vocab_size"])  # type: ignore[index]
    return torch.randint(0, vocabulary, (1, 5), generator=torch.Generator().manual_seed(1)).to(step.device)


def run_in_chunks(step: Program, run: Callable[..., Any], tokens: torch.Tensor, capacity: int) -> torch.Tensor:
    """The logits [1, 5, V] of five tokens, in a chunk of four and one of one."""
    device = step.device
    states = [spec.allocate(1, capacity, device) for spec in step.states]
    got = []
    for begin, end in ((0, 4), (4, 5)):
        positions, lengths = torch.arange(begin, end)[None], torch.tensor([begin])
        chunk = tokens[:, begin:end].contiguous()
        got.append(comparable(run(chunk, positions.to(device), lengths.to(device), *states)[0]))
    return torch.cat(got, dim=1)
