"""The demo's second part: the same model with weights in few bits, what it saves and what it loses."""

from __future__ import annotations

from rich.console import Console
from rich.progress import track
from rich.table import Table

import accelc
from accelc.demo.contenders import Contender, accelc_decoder, interleave
from accelc.demo.corpus import read_corpus
from accelc.demo.settings import Settings
from accelc.demo.tokenizer import encode_files
from accelc.demo.training import Trained
from accelc.runtime.decoder import Decoder

SCHEMES = ("int8", "int4:g64")
TOKENS = 4096
"""Held-out tokens that are scored; the whole text takes minutes."""
WINDOW = 512


def show_quantized(
    trained: Trained, settings: Settings, floats: Decoder, prompt: object, new_tokens: int, repeats: int,
    console: Console,
) -> dict[str, Decoder]:  # fmt: skip
    """Print bytes, perplexity on files that were held out from training, and tokens a second, by scheme; returns the
    decoders, by scheme.
    """
    corpus = read_corpus(settings.corpus_bytes)
    ids = encode_files(trained.tokenizer, corpus.held_out.values())[:TOKENS]
    decoders: dict[str, Decoder] = {"fp32": floats}
    losses = {}
    for scheme in SCHEMES:
        decoders[scheme] = accelc.compile(trained.model, max_length=floats.max_length, quantize=scheme)
    for name, decoder in track(decoders.items(), "Scoring held-out text", console=console, transient=True):
        losses[name] = accelc.perplexity(decoder, ids, window=min(WINDOW, floats.max_length))
    contenders = [Contender(name, accelc_decoder(d), 0.0) for name, d in decoders.items()]
    interleave(contenders, prompt, new_tokens, repeats)  # type: ignore[arg-type]
    table = Table(title=f"weights in few bits; perplexity on {len(ids)} tokens of held-out files")
    table.add_column("weights")
    for heading in ("MB", "perplexity", "tokens/s"):
        table.add_column(heading, justify="right")
    for contender in contenders:
        size = sum(t.numel() * t.element_size() for t in _weights(decoders[contender.name])) / 1e6
        loss = losses[contender.name].perplexity
        table.add_row(contender.name, f"{size:.1f}", f"{loss:.2f}", f"{contender.tokens_per_second:.0f}")
    console.print(table)
    return decoders


def _weights(decoder: object) -> list:
    """Every tensor that a step reads."""
    return list(decoder.programs["step"].tensors().values())  # type: ignore[attr-defined]
