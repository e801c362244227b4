"""CTranslate2, on the same weights converted by its own converter."""

import json
from pathlib import Path
from typing import Any

import torch

from accelc.demo.contenders import Generate, Timed
from peers import Clock, Job, Peer

PEER = Peer("CTranslate2", requires=("ctranslate2",), dtypes=("fp32",))  # its CPU code has no bf16


def prepare(job: Job) -> Path:
    """Convert the transformers directory, once."""
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    class Converter(TransformersConverter):
        """The vocabulary is made up: the prompts are ids, but the converter wants a tokenizer."""

        def load_tokenizer(self, *_: Any, **__: Any) -> PreTrainedTokenizerFast:
            letters = {
                letter: i for i, letter in enumerate(["<unk>", "<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])
            }
            return PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[])),
                unk_token="<unk>",
                bos_token="<s>",
                eos_token="</s>",
            )

    path = job.work / f"{job.path.name}.ct2"
    if not path.exists():
        Converter(str(job.path)).convert(str(path))
    return path


def build(job: Job, prepared: Path) -> Generate:
    import ctranslate2

    words = json.loads((prepared / "vocabulary.json").read_text(encoding="utf-8"))
    generator = ctranslate2.Generator(
        str(prepared), device="cpu", compute_type="float32", inter_threads=1, intra_threads=job.threads
    )

    def generate(prompt: torch.Tensor, new_tokens: int) -> Timed:
        clock = Clock()
        # The callback runs between steps. `generate_tokens` would fill a queue in another thread, ahead of its reader.
        generator.generate_batch(
            [[words[i] for i in prompt[0].tolist()]],
            max_length=new_tokens,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=lambda step: clock.add(step.token_id),
        )
        return clock.timed(new_tokens)

    return generate
