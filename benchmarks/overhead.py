"""Framework overhead of a decoding step, with drafts or without: everything but the compiled kernels.

The kernels are entered through one function of the native library; a clock around it gives, step by step, the time
inside and the time between. A second run under cProfile names the Python functions that the rest is spent in.
"""

import cProfile
import functools
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
from accelc.runtime.speculation.trees import RECYCLING


@dataclass(frozen=True)
class Overhead:
    """Microseconds a batch-1 decoding step, medians over `steps` steps."""

    what: str
    steps: int
    step: float
    kernels: float
    overhead: float
    profile: tuple[tuple[str, float], ...]  # function, its share of the profiled time outside the kernels

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"A {self.what} of the demo's model: {self.step:.0f} us, kernels {self.kernels:.0f} us, "
            f"overhead {self.overhead:.1f} us (medians of {self.steps} steps). Of the overhead, under a profiler:"
        ]
        return "\n".join(lines + [f"  {share:4.0%}  {name}" for name, share in self.profile])


def measure_demo_model(new_tokens: int = 200) -> Overhead:
    """`measure` on the architecture that the demo trains, with random weights."""
    return measure(*random_demo_model(), new_tokens)


def measure(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int, what: str = "step", **options) -> Overhead:
    """Decode `new_tokens` after `prompt` [1, T] with `accelc.compile(model)` and take the steps apart. options: of
    `generate`, for steps with drafts, of which each must be of the same size.
    """
    library = native.library(Options().march).kernels  # the very object that compiled steps use
    inside = library.accelc_plan_run
    calls: list[tuple[float, float]] = []

    def clocked(*arguments: object) -> int:
        begin = time.perf_counter()
        status = inside(*arguments)
        calls.append((begin, time.perf_counter()))
        return status

    library.accelc_plan_run = clocked  # before compilation: compiled steps keep a reference
    try:
        decoder = accelc.compile(model, max_length=prompt.shape[1] + new_tokens)
        run = functools.partial(decoder.generate, prompt, ignore_eos=True, **options)
        for _ in range(2):
            run(max_new_tokens=new_tokens)
        calls.clear()
        run(max_new_tokens=1)
        before = len(calls) + bool(options)  # a first call tells the drafter about the first token
        calls.clear()
        statistics = run(max_new_tokens=new_tokens).statistics
        steps = per_step(calls[before:], statistics.steps)
        profiler = cProfile.Profile()
        profiler.runcall(run, max_new_tokens=new_tokens)
    finally:
        library.accelc_plan_run = inside
    return Overhead(
        what=what,
        steps=len(steps),
        step=median(whole for whole, _ in steps) * 1e6,
        kernels=median(inside for _, inside in steps) * 1e6,
        overhead=median(whole - inside for whole, inside in steps) * 1e6,
        profile=_shares(profiler),
    )


def measure_speculation(new_tokens: int = 200) -> Overhead:
    """The same of a step that drafts, verifies and keeps a path of a tree of 8 nodes."""
    tree = RECYCLING.cut(8)
    options = {"draft": accelc.TokenRecycling(tree), "draft_nodes": tree.size}
    return measure(*random_demo_model(), new_tokens, "speculative step", **options)


def random_demo_model() -> tuple[torch.nn.Module, torch.Tensor]:
    """The architecture that the demo trains, with random weights, and a prompt [1, 16]."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(Settings(), end_token=0)).eval()
    return model, torch.randint(model.config.vocab_size, (1, 16))


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
