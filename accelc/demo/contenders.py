"""The ways to decode that the demo and the benchmark compare: transformers as it is, with Inductor, and accelc.

A contender is a function from a prompt and a number of new tokens to a `Timed` result. All decode greedily, go on after
an end-of-text token, and are timed from the call to each token on the host.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from accelc.runtime.decoder import Decoder


@dataclass(frozen=True)
class Timed:
    """One generation: its new tokens and when they came."""

    tokens: tuple[int, ...]
    first_token_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Rate of the tokens after the first, so that the prompt's length does not enter."""
        return (len(self.tokens) - 1) / (self.total_seconds - self.first_token_seconds)


Generate = Callable[[torch.Tensor, int], Timed]  # prompt [1, T] int64, new tokens


@dataclass
class Contender:
    """A ready way to decode; `compile_seconds` is what making it ready took beyond one warm generation."""

    name: str
    generate: Generate
    compile_seconds: float
    samples: list[Timed] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return median(s.tokens_per_second for s in self.samples)

    @property
    def first_token_seconds(self) -> float:
        return median(s.first_token_seconds for s in self.samples)


class Stopwatch(BaseStreamer):
    """A transformers streamer that keeps each token and the time it came; the first `put` is the prompt's."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        pass

    def timed(self, prompt_tokens: int) -> Timed:
        return Timed(
            tokens=tuple(self.tokens[prompt_tokens:]),
            first_token_seconds=self.times[1] - self.started,
            total_seconds=self.times[-1] - self.started,
        )


def make_ready(name: str, generate: Generate, started: float, prompt: torch.Tensor, new_tokens: int) -> Contender:
    """Warm a contender up by two generations; the second tells how much of the time since `started` was compilation.

    started: `time.perf_counter()` before anything was built for it.
    """
    generate(prompt, new_tokens)
    cold = time.perf_counter() - started
    warm = generate(prompt, new_tokens).total_seconds
    return Contender(name, generate, max(0.0, cold - warm))


def interleave(contenders: Sequence[Contender], prompt: torch.Tensor, new_tokens: int, repeats: int) -> None:
    """Sample all contenders in turn, `repeats` times, so that a change of the machine's pace meets all of them."""
    for _ in range(repeats):
        for contender in contenders:
            contender.samples.append(contender.generate(prompt, new_tokens))


def transformers_eager(model: PreTrainedModel) -> Generate:
    """`model.generate` as it is: dynamic cache, no compilation."""
    return _transformers(model, copy.deepcopy(model.generation_config))


def transformers_inductor(model: PreTrainedModel) -> Generate:
    """`model.generate` with a static cache and its decoding step compiled by `torch.compile` with Inductor."""
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation = "static"
    config.compile_config = CompileConfig(mode="default", fullgraph=True)
    # Without this, transformers compiles on GPUs alone.
    config.compile_config._compile_all_devices = True
    return _transformers(model, config)


def accelc_decoder(decoder: Decoder) -> Generate:
    """What `accelc.compile(model)` gives, timed by its own statistics."""

    def generate(prompt: torch.Tensor, new_tokens: int) -> Timed:
        result = decoder.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
        statistics = result.statistics
        return Timed(tuple(result.tokens[0].tolist()), statistics.first_token_seconds, statistics.total_seconds)

    return generate


def _transformers(model: PreTrainedModel, config: GenerationConfig) -> Generate:
    config.do_sample = False
    # An id that is never chosen: all contenders go on to the last token. (None would mean the model's own.)
    config.eos_token_id = model.config.vocab_size
    config.pad_token_id = 0

    def generate(prompt: torch.Tensor, new_tokens: int) -> Timed:
        config.max_new_tokens = new_tokens
        watch = Stopwatch()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=watch)
        return watch.timed(prompt.numel())

    return generate
