"""CheckStep: the derived step must reproduce the forward it was derived from, in every way the runtime will use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import CheckError, NotCausalError
from accelc.passes.closeness import (
    allowed,
    comparable,
    computing_dtype,
    differences,
    has_peaks,
    is_half,
    spread,
    what_is_not_finite,
)
from accelc.passes.probe_forward import changed_tokens, draw_tokens, probe_causality, probe_lengths, rounding_noise

Step = Callable[..., tuple[Tensor, ...]]
Allocate = Callable[[], list[Tensor]]

QUICK = 10
"""Checks of at most so many tokens probe the forward less often: where it is slow, its rows are what a check costs."""


@dataclass(frozen=True)
class Mode:
    """One way of running the step, and how far its logits were from the forward's."""

    name: str
    error: float

    def __str__(self) -> str:
        return f"{self.name}: {self.error:.1e}"


def check_step(
    forward: Program,
    step: Program,
    run: Step | None = None,
    *,
    length: int = 24,
    capacity: int | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> tuple[Mode, ...]:
    """Run `step` and `forward` on the same random tokens and compare the logits at every position.

    `run` is what to run in place of the step's own graph: its compiled form, for states of `capacity` slots. Token by
    token, in uneven chunks, two rows at different lengths, after a rollback of one row, and, for steps with a
    ``tree`` input, as trees; after probes that the forward is causal and the
    same at every length. Returns the
    error of each way. Raises `NotCausalError`, `NonFiniteLogitsError`, or `CheckError`, which names the first way
    that differs.
    """
    facts: dict[str, object] = forward.facts["capture"]  # type: ignore[assignment]
    vocabulary, longest = int(facts["input_vocab_size"]), int(facts["max_length"])  # type: ignore[call-overload]
    length = min(length, longest)
    run = run or step.run
    capacity = capacity or length + 16

    device, made = step.device, list[Tensor]()

    def states() -> list[Tensor]:
        """Zeros, in the same tensors for one way after the other: they are the largest that a check needs."""
        made.extend(s.allocate(2, capacity, device) for s in step.states[len(made) :])
        for state in made:
            state.zero_()
        return made

    generator = torch.Generator().manual_seed(seed)
    tokens = draw_tokens(forward, 2, length, generator)
    thorough = length > QUICK
    # Later tokens are changed in copies beside the original: two runs would read the weights twice.
    copies = changed_tokens(forward, tokens if thorough else tokens[:1])
    expected, changed = forward.run(torch.cat([tokens, copies]))[0].tensor_split([len(tokens)])
    if not has_peaks(expected):
        raise what_is_not_finite(forward.tensors())
    scale = spread(expected)
    dtype = computing_dtype(step)
    noise = 0.0
    if is_half(dtype) and not tolerance:
        rows = len(tokens) if thorough else 1
        noise = rounding_noise(forward, tokens[:rows], expected[:rows], generator) / scale
    bound = tolerance or allowed(dtype, noise)
    try:
        probe_causality(forward, changed, expected, bound * scale)
        probe_lengths(
            forward, tokens[:1], expected[:1], bound * scale, generator,
            suspected=bool(step.facts.get("length_dependent")), thorough=thorough,
        )  # fmt: skip
    except NotCausalError as error:
        _blame_something_else(forward, tokens[:1], expected[:1], bound, scale, error)
        raise
    modes = []
    ways = {"token by token": [1] * length, "uneven chunks": _uneven(length)}
    runs: list[tuple[str, Iterator[tuple[Tensor, Tensor]]]] = [
        (name, _run_chunks(step, run, states, tokens, chunks, expected)) for name, chunks in ways.items()
    ]
    runs.append(
        ("rows at different lengths, one rolled back", _run_ragged(step, run, states, tokens, expected, vocabulary))
    )
    if "tree" in step.inputs:
        runs.append(("tree", _run_tree(step, run, states, forward, tokens, vocabulary, generator)))
    for name, pairs in runs:
        furthest = max(float((comparable(got) - comparable(want)).abs_().max()) for got, want in pairs) / scale
        if not furthest <= bound:  # also catches NaN
            raise CheckError(
                f"the derived step differs from the forward when run {name}: {furthest:.2e} of the logits' spread "
                f"(allowed {bound:.0e})",
                where=f"program {step.name!r}, states {[s.name for s in step.states]}",
            )
        modes.append(Mode(name, furthest))
    return tuple(modes)


def _blame_something_else(
    forward: Program, tokens: Tensor, expected: Tensor, bound: float, scale: float, error: NotCausalError
) -> None:
    """Raise what else than later tokens changes the logits: `expected` [1, T, V] were computed beside other rows."""
    alone, again = (forward.run(tokens)[0] for _ in range(2))
    if not float(differences(alone, again).max()) <= bound * scale:
        raise NotCausalError(
            "the forward gives other logits for the same tokens when it is run again",
            where=error.where,
            remedy="Make it a function of its tokens: no dropout, noise or state in evaluation mode.",
        ) from error
    change = float(differences(alone, expected).max()) / scale
    if not change <= bound:
        raise CheckError(
            f"the logits of a row change with the other rows of its batch, by {change:.2e} of the logits' spread "
            f"(allowed {bound:.0e})",
            where=error.where,
        ) from error


def _call(step: Program, run: Step, tokens: Tensor, positions: Tensor, lengths: Tensor, states: list[Tensor]) -> Tensor:
    tree: tuple[Tensor, ...] = ()
    if "tree" in step.inputs:
        n = tokens.shape[1]
        words = torch.tensor([(1 << (i + 1)) - 1 for i in range(n)], device=tokens.device)
        tree = (words[None, :, None].expand(len(tokens), n, 1).contiguous(),)
    inputs = (tokens.contiguous(), positions.contiguous(), lengths)
    return run(*inputs, *tree, *states)[0].clone()


def _run_chunks(
    step: Program, run: Step, allocate: Allocate, tokens: Tensor, chunks: list[int], expected: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    batch, states = len(tokens), allocate()
    done = 0
    for n in chunks:
        positions = torch.arange(done, done + n, device=tokens.device).expand(batch, n)
        lengths = torch.full((batch,), done, device=tokens.device)
        got = _call(step, run, tokens[:, done : done + n], positions, lengths, states)
        yield got, expected[:, done : done + n]
        done += n


def _run_ragged(
    step: Program, run: Step, allocate: Allocate, tokens: Tensor, expected: Tensor, vocabulary: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Two rows that are never at the same length; the second takes wrong tokens first and is rolled back."""
    (batch, length), states = tokens.shape, allocate()
    lengths = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
    speeds = torch.tensor([3, 1], device=tokens.device)
    offset = torch.arange(3, device=tokens.device)
    rolled_back = False
    while int(lengths.min()) < length:
        positions = lengths[:, None] + offset
        index = positions.clamp(max=length - 1)
        chunk = tokens.gather(1, index)
        wrong = not rolled_back and int(lengths[1]) == min(4, length - 1)
        if wrong:
            chunk[1] = (chunk[1] + 1) % vocabulary
        got = _call(step, run, chunk, positions, lengths, states)
        for row in range(batch):
            valid = min(int(speeds[row]), length - int(lengths[row]))
            if valid > 0 and not (wrong and row == 1):
                at = int(lengths[row])
                yield got[row, :valid], expected[row, at : at + valid]
        if wrong:  # the wrong tokens are in the cache and, their length not advanced, never seen again
            rolled_back = True
            lengths = torch.minimum(lengths + speeds * torch.tensor([1, 0], device=tokens.device), torch.tensor(length))
        else:
            lengths = torch.minimum(lengths + speeds, torch.tensor(length, device=tokens.device))


def _run_tree(
    step: Program,
    run: Step,
    allocate: Allocate,
    forward: Program,
    tokens: Tensor,
    vocabulary: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A random six-node tree after a prefix of different length per row; each path must equal its own forward."""
    states = allocate()
    parents = [-1, 0, 0, 1, 1, 2]
    n = len(parents)
    paths = [_path(parents, i) for i in range(n)]
    depth = torch.tensor([len(p) - 1 for p in paths], device=tokens.device)
    words = torch.tensor([sum(1 << j for j in p) for p in paths], device=tokens.device)
    prefix = torch.tensor([tokens.shape[1] - 6, tokens.shape[1] - 9], device=tokens.device).clamp(min=1)
    longest = int(prefix.max())
    start = torch.arange(longest, device=tokens.device).expand(2, longest)
    _call(step, run, tokens[:, :longest], start, torch.zeros_like(prefix), states)
    nodes = torch.randint(0, vocabulary, (2, n), generator=generator).to(tokens.device)
    tree = words[None, :, None].expand(2, n, 1).contiguous()
    got = run(nodes, prefix[:, None] + depth, prefix, tree, *states)[0]
    for row in range(2):
        for i, path in enumerate(paths):
            sequence = torch.cat([tokens[row, : int(prefix[row])], nodes[row, path]])
            yield got[row, i], forward.run(sequence[None])[0][0, -1]


def _path(parents: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _uneven(length: int) -> list[int]:
    chunks: list[int] = []
    done, sizes = 0, [2, 1, 5, 3, 1, 7]
    while done < length:
        n = min(sizes[len(chunks) % len(sizes)], length - done)
        chunks.append(n)
        done += n
    return chunks
