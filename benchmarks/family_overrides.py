"""What the rules of `family_configs` cannot guess: per model type, the fields whose values constrain each other.

A nested dict belongs to the nested configuration of that name; its `model_type` replaces that configuration's class.
"""

from __future__ import annotations

from typing import Any

_WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Gemma 4: two layers that keep their keys and values, two that reuse them; wider heads in the full layers.
_GEMMA4_TEXT = {
    "num_hidden_layers": 4,
    "layer_types": _WINDOW_AND_FULL * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
}
_GEMMA3N_TEXT = {
    "num_hidden_layers": 4,
    "layer_types": _WINDOW_AND_FULL * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "intermediate_size": [128] * 4,
}
_DOTS3_NOTE_TEXT = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_qk_rope_head_dim": 16,
    "swa_v_head_dim": 16,
    "sliding_window": 8,
}
# Chunked attention with rotary positions in three layers of four, experts in every second; the class fills the lists.
_LLAMA4_TEXT = {
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "moe_layers": None,
    "no_rope_layers": None,
    "layer_types": None,
}
_QWEN4_EXP_TEXT = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 128,
    "split_ngram_parts": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "cohere_compass_text": {
        "layer_types": _WINDOW_AND_FULL,
        "rope_parameters": {"full_attention": dict(_ROPE), "sliding_attention": dict(_ROPE)},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": _WINDOW_AND_FULL,
    },
    "dots3_note": {
        "text_config": _DOTS3_NOTE_TEXT,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3_NOTE_TEXT,
    "flint": {"mlp_only_layers": [0]},
    "gemma3n": {
        "text_config": _GEMMA3N_TEXT,
        "vision_config": {"vocab_offset": 128, "vocab_size": 8},
        "audio_config": {"vocab_offset": 136, "vocab_size": 8},
    },
    "gemma3n_text": _GEMMA3N_TEXT,
    "gemma4": {"text_config": _GEMMA4_TEXT},
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified": {"text_config": _GEMMA4_TEXT},
    "gemma4_unified_text": _GEMMA4_TEXT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": _LLAMA4_TEXT},
    "llama4_text": _LLAMA4_TEXT,
    "mamba2": {"head_dim": 32},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,  # as many as key heads
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "qwen4_exp": {"text_config": _QWEN4_EXP_TEXT},
    "qwen4_exp_text": _QWEN4_EXP_TEXT,
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}

# Registered as causal language models, but no function from token ids to logits.
NOT_TOKEN_MODELS: dict[str, str] = {
    "gemma4_assistant": "takes hidden states, keys and values of another model, no token ids",
    "gemma4_unified_assistant": "takes hidden states, keys and values of another model, no token ids",
}
