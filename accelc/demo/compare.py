"""Shows that two ways of decoding gave the same tokens, and prints the table of their times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from accelc.demo.contenders import Contender

# Two logits closer than this, in fp32, are told apart by rounding alone.
TIE = 1e-3


@dataclass(frozen=True)
class Difference:
    """The first place where two greedy continuations part, and the reference model's logits of both tokens there."""

    index: int  # among the new tokens
    expected: int
    actual: int
    margin: float  # logit of `expected` minus logit of `actual`

    @property
    def is_tie(self) -> bool:
        return abs(self.margin) <= TIE


@torch.inference_mode()
def first_difference(
    model: torch.nn.Module, prompt: torch.Tensor, expected: Sequence[int], actual: Sequence[int]
) -> Difference | None:
    """Compare two continuations of `prompt` [1, T]; `model` maps ids to an object with logits [1, T, V].

    A shorter continuation counts as parting where it ends; its missing token is given as -1 with an infinite margin.
    """
    for index in range(max(len(expected), len(actual))):
        pair = [tokens[index] if index < len(tokens) else -1 for tokens in (expected, actual)]
        if pair[0] == pair[1]:
            continue
        if -1 in pair:
            return Difference(index, pair[0], pair[1], margin=float("inf"))
        prefix = torch.cat([prompt[0], torch.tensor(list(expected[:index]), dtype=torch.int64, device=prompt.device)])
        logits = model(prefix[None]).logits[0, -1].float()
        return Difference(index, pair[0], pair[1], margin=(logits[pair[0]] - logits[pair[1]]).item())
    return None


def table(contenders: Sequence[Contender], title: str) -> Table:
    """One row a contender, medians; the speed-up is over the first one."""
    result = Table(title=title)
    result.add_column("decoder")
    for heading in ("tokens/s", "speed-up", "first token", "compile"):
        result.add_column(heading, justify="right")
    base = contenders[0].tokens_per_second
    for each in contenders:
        result.add_row(
            each.name,
            f"{each.tokens_per_second:.1f}",
            f"{each.tokens_per_second / base:.2f}x",
            f"{each.first_token_seconds * 1e3:.1f} ms",
            f"{each.compile_seconds:.1f} s" if each.compile_seconds >= 0.05 else "-",
        )
    return result
