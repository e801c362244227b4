"""Probes of the forward itself: is it causal, at every length, and how much does rounding move its logits?"""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import NotCausalError
from accelc.ir.program import fetch
from accelc.passes.closeness import differences

aten = torch.ops.aten

COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isin}
SHARE = 0.35
"""Share of drawn tokens that are ids which the forward compares its tokens with."""
QUICK_LENGTH, LENGTH, SUSPECTED_LENGTH = 23, 64, 1024
"""Longest sequence probed: quickly, thoroughly, and when an index table was seen to depend on the total length."""


def draw_tokens(forward: Program, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random tokens [B, T] in which ids that the forward treats apart (padding, image tokens ...) are frequent."""
    vocabulary = int(forward.facts["capture"]["input_vocab_size"])  # type: ignore[index]
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator)
    special = torch.tensor(sorted(i for i in compared_ids(forward) if 0 <= i < vocabulary), dtype=torch.int64)
    if len(special):
        chosen = special[torch.randint(0, len(special), (batch, length), generator=generator)]
        drawn = torch.rand(batch, length, generator=generator, dtype=torch.float32)
        tokens = torch.where(drawn < SHARE, chosen, tokens)
    return tokens.to(forward.device)


def compared_ids(forward: Program) -> set[int]:
    """Integers that integer values of the graph are compared with."""
    found: set[int] = set()
    for node in forward.graph.nodes:
        if getattr(node.target, "overloadpacket", None) not in COMPARISONS:
            continue
        value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        if not isinstance(value, Tensor) or value.is_floating_point():
            continue
        for other in node.args[1:]:
            if isinstance(other, int) and not isinstance(other, bool):
                found.add(other)
            elif isinstance(other, fx.Node) and other.op == "get_attr":
                tensor = fetch(forward.module, str(other.target))
                if not tensor.is_floating_point() and tensor.numel() <= 64:
                    found.update(int(i) for i in tensor.flatten())
    return found


def rounding_noise(forward: Program, tokens: Tensor, expected: Tensor, generator: torch.Generator) -> float:
    """How far the logits move when every half-precision result is off by up to a unit in the last place.

    That is what another order of summation does, so it is what the step, computing the same in another order, may
    differ.
    """

    class Perturbed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.op != "call_function" or not isinstance(result, Tensor):
                return result
            if result.dtype not in (torch.bfloat16, torch.float16):
                return result
            noise = torch.rand(result.shape, generator=generator, dtype=torch.float32).to(result.device) * 2 - 1
            return (result.float() * (1 + noise * torch.finfo(result.dtype).eps)).to(result.dtype)

    with torch.no_grad():
        return float(differences(Perturbed(forward.module).run(tokens)[0], expected).max())


def changed_tokens(forward: Program, tokens: Tensor) -> Tensor:
    """Other tokens [B, T] in the second half."""
    cut = tokens.shape[1] // 2
    vocabulary = int(forward.facts["capture"]["input_vocab_size"])  # type: ignore[index]
    return torch.cat([tokens[:, :cut], (tokens[:, cut:] + 1) % vocabulary], dim=1)


def probe_causality(forward: Program, changed: Tensor, expected: Tensor, bound: float) -> None:
    """Changing later tokens must leave earlier logits as they were. Raises `NotCausalError` naming the position.

    `changed`: the logits [b, T, V] for `changed_tokens`; `expected`: [B, T, V] for the tokens as they were, b <= B.
    """
    cut = expected.shape[1] // 2
    _compare(forward, changed, expected[: len(changed)], cut, bound, f"tokens from position {cut} on change")


def probe_lengths(
    forward: Program, tokens: Tensor, known: Tensor, bound: float, generator: torch.Generator, *,
    suspected: bool, thorough: bool
) -> None:  # fmt: skip
    """The logits of a prefix must not depend on how long the sequence is. Raises `NotCausalError`.

    Runs one sequence that goes on from `tokens` [1, T], whose logits `known` [1, T, V] are, up to 23 tokens, and a
    prefix of two. Thoroughly: up to 64 (1024 when a table was seen to depend on the length), and several prefixes.
    """
    facts: dict[str, object] = forward.facts["capture"]  # type: ignore[assignment]
    most = SUSPECTED_LENGTH if suspected else LENGTH if thorough else QUICK_LENGTH
    longest = min(int(facts["max_length"]), most)  # type: ignore[call-overload]
    short = tokens.shape[1]
    if longest > short:
        tokens = torch.cat([tokens, draw_tokens(forward, 1, longest - short, generator)], dim=1)
        expected = forward.run(tokens)[0]
        _compare(forward, known, expected, short, bound, f"the sequence ends after {short} tokens")
    else:
        expected = known
    prefixes = {2}
    if thorough or suspected:
        pieces = 16 if suspected else 4
        prefixes |= {3, 7, longest - 1, *(longest * i // pieces for i in range(1, pieces))}
    for n in sorted(prefixes):
        if 2 <= n < longest:
            _compare(forward, forward.run(tokens[:, :n])[0], expected, n, bound, f"the sequence ends after {n} tokens")


def _compare(forward: Program, got: Tensor, expected: Tensor, cut: int, bound: float, when: str) -> None:
    difference = differences(got[:, :cut], expected[:, :cut])
    leaks = torch.nonzero(~(difference <= bound)).flatten()
    if len(leaks):
        raise NotCausalError(
            f"the logits at position {int(leaks[0])} change by {float(difference[leaks[0]]):.2e} when {when}",
            where=f"{forward.facts['capture']['model']}",  # type: ignore[index]
        )
