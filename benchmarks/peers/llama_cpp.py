"""llama.cpp through llama-cpp-python, on the same weights written as a GGUF file."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import Job, Peer, timed

PEER = Peer("llama.cpp", requires=("llama_cpp", "gguf"), dtypes=("fp32", "bf16", "int8", "int4"))

# Its own quantizations of about as many bits.
FILE_TYPES = {"int8": "Q8_0", "int4": "Q4_0"}

# llama.cpp's names of a layer's tensors, by transformers' names.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def prepare(job: Job) -> Path:
    """Write the weights as GGUF, once, and quantize them by llama.cpp's own program where few bits are asked for."""
    return converted(job, FILE_TYPES.get(job.dtype, ""))


def converted(job: Job, file_type: str) -> Path:
    """The GGUF file; `file_type` is llama.cpp's name of a quantization, empty for none."""
    path = job.work / f"{job.path.name}.gguf"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        _write(job, unfinished)
        unfinished.rename(path)
    if not file_type:
        return path
    quantized = path.with_name(f"{path.stem}-{file_type}.gguf")
    if not quantized.exists():
        import llama_cpp

        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        parameters.nthread = job.threads
        unfinished = quantized.with_suffix(".unfinished")
        status = llama_cpp.llama_model_quantize(str(path).encode(), str(unfinished).encode(), parameters)
        if status:
            raise RuntimeError(f"llama.cpp could not quantize to {file_type}: status {status}")
        unfinished.rename(quantized)
    return quantized


def build(job: Job, prepared: Path) -> Any:
    import llama_cpp
    import numpy as np

    # Its cache is half precision unless told otherwise: with bf16 weights of the same size, with fp32 less exact.
    cache = llama_cpp.GGML_TYPE_F32 if job.dtype == "fp32" else llama_cpp.GGML_TYPE_F16
    model = llama_cpp.Llama(
        str(prepared),
        n_ctx=job.max_length,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        type_k=cache,
        type_v=cache,
        verbose=False,
    )

    def choose() -> int:
        row = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(
            np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (job.shape.vocabulary,)).argmax()
        )

    def stream(ids: list[int]) -> Iterator[int]:
        model.reset()
        while True:
            model.eval(ids)
            ids = [choose()]
            yield ids[0]

    return lambda prompt, new_tokens: timed(stream(prompt[0].tolist()), new_tokens)


def _write(job: Job, path: Path) -> None:
    import gguf
    import numpy as np
    import torch
    from safetensors.torch import load_file

    shape = job.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(job.max_length)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType.F32 if job.dtype == "fp32" else gguf.GGMLQuantizationType.BF16
    for file in sorted(job.path.glob("*.safetensors")):
        for name, value in load_file(file).items():
            data = value.to(torch.float32)
            for part, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads)):
                if part in name:  # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
                    data = data.view(heads, 2, -1, shape.hidden).transpose(1, 2).reshape(data.shape)
            if data.ndim == 1:  # norms stay in fp32
                writer.add_tensor(_name(name), np.ascontiguousarray(data.numpy()))
            else:
                writer.add_tensor(_name(name), gguf.quants.quantize(data.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    index, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{LAYER[rest]}.weight"
