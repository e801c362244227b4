"""Compile a transformers model and continue two prompts of different lengths: python examples/generate.py"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import accelc

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()  # random weights; from_pretrained(...) is used the same way

decoder = accelc.compile(model, max_length=128)
result = decoder.generate([[1, 2, 3, 4, 5], [6, 7]], max_new_tokens=16)
for prompt, tokens, reason in zip(result.prompts, result.tokens, result.finish_reasons):
    print(prompt.tolist(), "->", tokens.tolist(), reason)
print(result.statistics)
