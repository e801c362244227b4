"""Stream tokens as they are decoded, and stop early: python examples/stream.py"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import accelc

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128)).eval()
decoder = accelc.compile(model, max_length=128)

sampling = accelc.SamplingParams(temperature=1.0, top_k=50)
with decoder.stream([10, 20, 30], max_new_tokens=100, sampling=sampling, seed=1, ignore_eos=True) as stream:
    for count, event in enumerate(stream, start=1):
        print(event.token, end=" ", flush=True)
        if count == 20:  # leaving the block ends the generation
            break
print()
