"""transformers architectures at test size: two layers (four where kinds of layers alternate), random weights.

Each entry is a configuration class and what differs from that class's defaults. Windows and chunks are shorter than the
tests' sequences, so that forgetting one shows.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .weights import random_model

VOCABULARY = 97
POSITIONS = 256
WINDOW = 8

# The names most decoder configurations share.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DENSE = _COMMON | {"intermediate_size": 128}
_GROUPED = _DENSE | {"num_key_value_heads": 2}
_GPT2_NAMES = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

LIBRARY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama_tied": ("LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "llama3_rope": (
        "LlamaConfig",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gpt2": ("GPT2Config", _GPT2_NAMES),
    "opt": (
        "OPTConfig",
        _COMMON | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 24}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        _GROUPED
        | _ALTERNATING
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _GROUPED | _ALTERNATING | {"head_dim": 16, "query_pre_attn_scalar": 20},
    ),
    "phi3": ("Phi3Config", _GROUPED),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS},
    ),
    "gptj": ("GPTJConfig", _GPT2_NAMES | {"rotary_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", _DENSE),
    "falcon": (
        "FalconConfig",
        _COMMON | {"multi_query": True, "parallel_attn": True, "alibi": False, "new_decoder_architecture": False},
    ),
    "falcon_alibi": (
        "FalconConfig",
        _COMMON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "falcon_grouped": ("FalconConfig", _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": (
        "MixtralConfig",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        _GROUPED
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        _DENSE
        | {
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "cohere": ("CohereConfig", _GROUPED | {"logit_scale": 1.0}),
    "llama4_text": (
        "Llama4TextConfig",
        _GROUPED
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW,
        },
    ),
    "starcoder2": ("Starcoder2Config", _GROUPED | {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", _GROUPED),
}

# Without position embeddings a repeated token tends to stay; with the default seed these do so within a few tokens.
SEEDS = {"falcon_alibi": 1}


POSITION_OPTIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def build(name: str, positions: int = POSITIONS) -> nn.Module:
    """The named architecture with random weights: fp32, evaluation mode, the same weights on every call. positions:
    tokens that it takes at least.
    """
    import transformers

    config_class, options = LIBRARY[name]
    options = options | {key: positions for key in POSITION_OPTIONS if key in options}
    config = getattr(transformers, config_class)(**options)
    return random_model(lambda: transformers.AutoModelForCausalLM.from_config(config), SEEDS.get(name, 0))
