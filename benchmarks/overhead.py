"""Framework overhead of a decoding step: everything but the compiled kernels.

The kernels are entered through one function of the native library; a clock around it gives, step by step, the time
inside and the time between. A second run under cProfile names the Python functions that the rest is spent in.
"""

import cProfile
import itertools
import pstats
import time
from dataclasses import dataclass
from statistics import median

import torch
from transformers import LlamaForCausalLM

import accelc
from accelc.codegen import Options, native
from accelc.demo.settings import Settings
from accelc.demo.training import model_config


@dataclass(frozen=True)
class Overhead:
    """Microseconds a batch-1 decoding step, medians over `steps` steps."""

    steps: int
    step: float
    kernels: float
    overhead: float
    profile: tuple[tuple[str, float], ...]  # function, its share of the profiled time outside the kernels

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"A step of the demo's model: {self.step:.0f} us, kernels {self.kernels:.0f} us, "
            f"overhead {self.overhead:.1f} us (medians of {self.steps} steps). Of the overhead, under a profiler:"
        ]
        return "\n".join(lines + [f"  {share:4.0%}  {name}" for name, share in self.profile])


def measure_demo_model(new_tokens: int = 200) -> Overhead:
    """`measure` on the architecture that the demo trains, with random weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(Settings(), end_token=0)).eval()
    return measure(model, torch.randint(model.config.vocab_size, (1, 16)), new_tokens)


def measure(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> Overhead:
    """Decode `new_tokens` after `prompt` [1, T] with `accelc.compile(model)` and take the steps apart."""
    library = native.library(Options().march).kernels  # the very object that compiled steps use
    run = library.accelc_plan_run
    calls: list[tuple[float, float]] = []

    def clocked(*arguments: object) -> int:
        begin = time.perf_counter()
        status = run(*arguments)
        calls.append((begin, time.perf_counter()))
        return status

    library.accelc_plan_run = clocked  # before compilation: compiled steps keep a reference
    try:
        decoder = accelc.compile(model, max_length=prompt.shape[1] + new_tokens)
        decoder.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
        calls.clear()
        decoder.generate(prompt, max_new_tokens=1, ignore_eos=True)
        prefill_calls = len(calls)
        calls.clear()
        decoder.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
        steps = per_step(calls[prefill_calls:], new_tokens - 1)
        profiler = cProfile.Profile()
        profiler.runcall(decoder.generate, prompt, max_new_tokens=new_tokens, ignore_eos=True)
    finally:
        library.accelc_plan_run = run
    return Overhead(
        steps=len(steps),
        step=median(whole for whole, _ in steps) * 1e6,
        kernels=median(inside for _, inside in steps) * 1e6,
        overhead=median(whole - inside for whole, inside in steps) * 1e6,
        profile=_shares(profiler),
    )


def per_step(calls: list[tuple[float, float]], steps: int) -> list[tuple[float, float]]:
    """Seconds (whole, inside kernels) of each step but the last, from the begin and end of all kernel calls."""
    each, rest = divmod(len(calls), steps)
    if rest or not each:
        raise ValueError(f"{len(calls)} kernel calls do not divide into {steps} steps")
    groups = [calls[i : i + each] for i in range(0, len(calls), each)]
    return [
        (after[0][0] - group[0][0], sum(end - begin for begin, end in group))
        for group, after in itertools.pairwise(groups)
    ]


def _shares(profiler: cProfile.Profile, most: int = 8) -> tuple[tuple[str, float], ...]:
    """The functions with the most own time, as shares of all but the kernels (which run inside `clocked`)."""
    own = {
        f"{file.rsplit('/', 1)[-1]}:{name}": values[2]
        for (file, _, name), values in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
        if name != "clocked"
    }
    total = sum(own.values())
    return tuple((name, seconds / total) for name, seconds in sorted(own.items(), key=lambda kv: -kv[1])[:most])
