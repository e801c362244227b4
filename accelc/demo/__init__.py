"""The demo: train a small model on the standard library's source, decode with it, compare with transformers.

accelc demo                        # trains once (about three minutes on two cores), then compiles and compares
accelc demo --prompt "class Node:" # another prompt, the model from the cache
"""

from typing import Annotated

import typer

PROMPT = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of the file'''


def main(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 200,
    repeats: Annotated[int, typer.Option(help="Samples of each decoder; the table shows medians.", min=1)] = 5,
    steps: Annotated[int | None, typer.Option(help="Training steps; the default trains about three minutes.")] = None,
) -> None:
    """Train a small model on real text, compile it, and show that it decodes the same tokens, faster."""
    # transformers, accelerate and tokenizers are needed here alone, and importing them takes seconds.
    from accelc.demo.show import show

    show(prompt, new_tokens, repeats, steps)
