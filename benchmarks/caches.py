"""What the minimum cut caches for well-known shapes: bytes a token and layer, printed and written to docs/caches.md.

    python benchmarks/caches.py

Per-layer dims are those of the published models; the number of layers, experts and tokens in the vocabulary is reduced,
because the choice is made in each layer alone. Weights are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from accelc.capture import capture
from accelc.ir import Program
from accelc.pipeline import step_pipeline

LAYERS = 2
TABLE = Path(__file__).parent.parent / "docs" / "caches.md"
SMALL = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "LlamaConfig",
        {
            "hidden_size": 4096, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336,
        },
    ),
    "Bloom-7B": ("BloomConfig", {"hidden_size": 4096, "n_layer": LAYERS, "n_head": 32}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {
            "num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS, "hidden_size": 7168,
            "intermediate_size": 2048,
            "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 4, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2,
        },
    ),
}  # fmt: skip


def derive(name: str) -> Program:
    """The step of a shape, in bfloat16."""
    import transformers

    config_class, fields = SHAPES[name]
    config = getattr(transformers, config_class)(**SMALL, **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return step_pipeline().run(capture(model, max_length=2048))


def main(
    table: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path(__file__).parent.parent
    / "docs/caches.md",
) -> None:
    """Derive the steps and print what they cache."""
    lines = [
        "# What is cached", "",
        "The minimum cut's choice for published layer shapes in bfloat16, by `python benchmarks/caches.py`:", "",
        "| model | cached value | shape | bytes a token and layer |", "|---|---|---|---|",
    ]  # fmt: skip
    for name in SHAPES:
        step = derive(name)
        shown = Table("cached value", "shape", "bytes a token", title=name, title_justify="left")
        for spec in step.states[: len(step.states) // LAYERS]:
            shape = "[" + ", ".join(map(str, spec.shape)) + "]"
            shown.add_row(spec.origin, shape.replace("[", r"\["), str(spec.bytes_per_token()))
            lines.append(f"| {name} | `{spec.origin}` | {shape} | {spec.bytes_per_token()} |")
        Console().print(shown)
        for record in step.history:
            for note in record.notes:
                if record.name in ("derive_step", "absorb_projections"):
                    Console().print(f"  {record.name}: {note}", highlight=False)
    lines += [
        "",
        "Llama caches eight key and eight value heads, before they are repeated for the 32 query heads. Bloom",
        "has no rotary embedding and caches plain keys and values. DeepSeek-V3 caches the latent with the",
        f"rotary part of the keys, 512 + 64 numbers, in place of {128 * (192 + 128)} for all heads.",
        "",
    ]
    table.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
