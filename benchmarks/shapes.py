"""The model shapes that the benchmark decodes: Llama architecture, random weights made on the fly from a fixed seed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accelc.ir.quantized import Scheme

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.bfloat16}
"""What weights are decoded in, and the type they are stored and activations computed in."""
SCHEMES = {"int8": ("int8", "int8"), "int4": ("int4", "int8")}
"""accelc's quantization schemes of the layers and of the output matrix; peers have their own of as many bits."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-architecture model."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool  # the output matrix is the input embedding

    def config(self, max_length: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=self.tied,
            # Wider than the default: with it a tied random model just repeats its last token, which would test nothing.
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=None,
        )

    @property
    def parameters(self) -> int:
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden

    def bytes_per_token(self, dtype: str, context: float) -> float:
        """Bytes one decoding step must read: the weights of the layers and the output matrix, and the cache."""
        output = self.vocabulary * self.hidden
        layers = self.parameters - output * (1 if self.tied else 2)
        cached = 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * context
        each = DTYPES[dtype].itemsize
        if dtype not in SCHEMES:
            return (layers + output + cached) * each
        bits = [Scheme.parse(scheme).bits_per_weight(self.hidden) for scheme in SCHEMES[dtype]]
        return layers * bits[0] / 8 + output * bits[1] / 8 + cached * each


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 128, 352, 2, 4, 2, 512, tied=True),  # for tests
        Shape("160m", 768, 3072, 12, 12, 12, 32_000, tied=False),  # as JackFram/llama-160m
        Shape("1b", 2048, 8192, 16, 32, 8, 128_256, tied=True),  # as Llama-3.2-1B
        Shape("8b", 4096, 14_336, 32, 32, 8, 128_256, tied=False),  # as Llama-3.1-8B
    )
}


def make_model(shape: Shape, dtype: str, max_length: int, path: Path, seed: int = 0) -> None:
    """Write random weights as a transformers directory at `path`, unless it is there: all peers read the same."""
    if (path / "config.json").exists():
        return
    torch.manual_seed(seed)
    torch.set_default_dtype(DTYPES[dtype])
    try:
        model = LlamaForCausalLM(shape.config(max_length))
    finally:
        torch.set_default_dtype(torch.float32)
    unfinished = path.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    unfinished.rename(path)


def load_model(path: Path) -> LlamaForCausalLM:
    """The model at `path` in evaluation mode, in the dtype it was saved in, its weights really read."""
    model = LlamaForCausalLM.from_pretrained(path, dtype="auto").eval()
    for parameter in model.parameters():  # memory-mapped weights would be read during the first measured step
        parameter.data = parameter.data.clone()
    model.tie_weights()
    return model


def prompt(shape: Shape, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [1, tokens] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocabulary, (1, tokens), generator=generator)
