"""Random weights under which small models say something: logits of order one and varied greedy tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

GAIN = 3.0
EMBEDDING_GAIN = 0.4
VECTOR_NOISE = 0.1


@torch.no_grad()
def random_model(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Call `make` and redraw the weights: fp32, evaluation mode, the same weights whenever called with the same `seed`.

    Matrices (and stacks of them, such as experts) get `GAIN`, embeddings `EMBEDDING_GAIN` times the Glorot scale: what
    the blocks add then outweighs the token's own embedding, which with tied embeddings would make every token predict
    itself, and attention is sharp enough to tell tokens apart. Vectors (norm weights, biases, sinks) keep their initial
    value plus noise, so that a norm weight that is ignored, or a bias that is dropped, shows. The library's own
    initialisation (standard deviation 0.02) would leave most mistakes in attention below the rounding of the logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().float().eval()
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() < 2:
                parameter.add_(noise * VECTOR_NOISE)
                continue
            glorot = (parameter.shape[-1] * parameter.shape[-2]) ** -0.25
            parameter.copy_(noise * glorot * (EMBEDDING_GAIN if id(parameter) in embeddings else GAIN))
    return model
