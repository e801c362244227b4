"""The demo's last part: the same prompt by speculative decoding, with the tokens compared."""

from __future__ import annotations

from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from accelc.runtime.decoder import Decoder

DRAFTERS = ("prompt_lookup", "token_recycling")


def show_speculation(
    decoders: dict[str, Decoder], prompt: torch.Tensor, new_tokens: int, repeats: int, console: Console
) -> bool:
    """Print tokens a second and a step, with and without drafters, by weights; whether all tokens agree."""
    table = Table(title="speculative decoding of the same prompt (steps of so small a model have no time to spare)")
    table.add_column("weights")
    table.add_column("drafter")
    for heading in ("tokens/s", "tokens a step", "same tokens"):
        table.add_column(heading, justify="right")
    every = True
    ways = [(name, draft) for name in decoders for draft in (False, *DRAFTERS)]
    results: dict[tuple[str, str | bool], list] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for name, draft in ways:
            result = decoders[name].generate(prompt, max_new_tokens=new_tokens, ignore_eos=True, draft=draft)
            if turn:  # the first one learns what a step costs
                results[name, draft].append(result)
    for name, draft in ways:
        found = results[name, draft]
        same = all(torch.equal(r.tokens[0], results[name, False][0].tokens[0]) for r in found)
        every &= same
        last = found[-1].statistics.speculation
        table.add_row(
            name,
            str(draft or "-"),
            f"{median(r.statistics.decode_tokens_per_second for r in found):.0f}",
            f"{last.mean_accepted_length:.2f}" if last else "1.00",
            "yes" if same else "[red]no[/red]",
        )
    console.print(table)
    return every
