"""A decoding loop written by hand over transformers' model: one static cache, one compiled step, no `generate`.

This is how gpt-fast decodes. Frozen weights need it: with `TORCHINDUCTOR_FREEZING=1` the compiled step holds the very
cache tensors that it was compiled with, while `generate` makes a new static cache at each call; its second call would
write to the first one's cache, beyond its end.
"""

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel, StaticCache

from accelc.demo.contenders import Generate
from peers import timed


def static_loop(model: PreTrainedModel, max_length: int, backend: str = "inductor") -> Generate:
    """Greedy decoding: the prompt's step as it is, the steps of one token (with their argmax) by `torch.compile`.

    The prompt and all new tokens but the last must fit in `max_length` slots of the cache.
    """
    cache = StaticCache(config=model.config, max_cache_len=max_length)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        """From token ids [1, N] to the next one [1, 1]."""
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(-1)

    compiled = torch.compile(step, dynamic=False, fullgraph=True, backend=backend)
    return lambda prompt, new_tokens: timed(_tokens(step, compiled, cache, prompt), new_tokens)


Step = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def _tokens(prefill: Step, step: Step, cache: StaticCache, prompt: torch.Tensor) -> Iterator[int]:
    cache.reset()
    token = prefill(prompt)
    while True:
        yield int(token)
        token = step(token)
