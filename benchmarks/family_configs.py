"""Small configurations for every causal language model type that transformers registers.

`small_config(model_type)` walks the fields of the type's configuration class and shrinks each by a rule on its name
(`RULES`), keeps one layer of every kind that the default model has, recurses into nested configurations, and finally
applies what `family_overrides.OVERRIDES` says about the type, for the few whose fields constrain each other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from family_overrides import OVERRIDES
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN = 64
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
INDEX_HEADS = (
    32  # with few, their rectified scores are often all zero: ties between keys, which top-k breaks as it likes
)
VOCABULARY = 128
RESERVED_TOKENS = 16  # special tokens lie below, text is drawn from above
MAX_POSITIONS = 256
WINDOW = 8  # shorter than the probe's sequences, so that windows and chunks matter
MIN_LAYERS = 2

Rule = Callable[[Any, dict[str, Any]], Any]


def _kv_heads(default: int, defaults: dict[str, Any]) -> int:
    """Keep the kind of sharing: one head for all, a head each, or groups of two."""
    heads = next((defaults[n] for n in ("num_attention_heads", "n_head", "n_heads") if n in defaults), default)
    if default == 1:
        return 1
    return HEADS if default == heads else HEADS // 2


def _at_most(limit: int) -> Rule:
    return lambda default, _: min(default, limit)


def _constant(value: int) -> Rule:
    return lambda _default, _defaults: value


# Field name -> small value, for integer fields whose default is not None; the first match wins.
RULES: tuple[tuple[str, Rule], ...] = (
    (r".*vocab_size(_per_layer_input)?", lambda default, _: VOCABULARY if default > VOCABULARY else default),
    (r"(num_)?(hidden_|decoder_|encoder_)?(n_)?layers?|n_layers?|num_(de|en)coder_layers", _constant(MIN_LAYERS)),
    (r"(swa_)?num_key_value_heads|num_kv_heads|n_head_kv", _kv_heads),
    (r"(\w+_)?(attention|key|value|mamba)_heads|n_heads?|num_heads|attention_heads", _constant(HEADS)),
    (r"index_n_heads", _constant(INDEX_HEADS)),
    (r"mamba_n_heads|n_mamba_heads|linear_num_heads", _constant(HEADS)),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|(\w+_)?head_dim|dim_head|kv_channels", _constant(HEAD_DIM)),
    (r"attention_head_size|d_kv", _constant(HEAD_DIM)),
    (r"rotary_dim", _constant(HEAD_DIM // 2)),
    (
        r"hidden_size(_global)?|backbone_hidden_size|d_model|n_embd|emb_dim|(input_|output_)?embedding_size|cross_attention_hidden_size",
        _constant(HIDDEN),
    ),
    (r"\w*intermediate_size(_mlp)?|\w*ffn_dim|ffn_hidden_size|dff|dim_ff|n_inner", _constant(2 * HIDDEN)),
    (r"expert_ffn_hidden_size|feed_forward_size|d_inner|router_hidden_size", _constant(2 * HIDDEN)),
    (r"hidden_size_per_layer_input|d_rel|\w*_rank|hc_lowrank", _constant(HEAD_DIM)),
    (r"(moe_)?num_experts|num_local_experts|n_routed_experts", _at_most(4)),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", _at_most(2)),
    (r"n_group|topk_group|n_groups", _constant(1)),
    (r"(moe_num|n|num)_shared_experts|zero_expert_num", _at_most(1)),
    (r"first_k_dense_replace|num_dense_layers", _at_most(1)),
    (r"(num_)?nextn_predict_layers|num_mtp_layers", _constant(0)),
    (
        r"(attention_|keep_)?(sliding_)?window(_size)?|attention_chunk_size|local_attention(_window_len)?",
        _constant(WINDOW),
    ),
    (r"attention_window_size|index_topk", _constant(WINDOW)),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions|context_length",
        _constant(MAX_POSITIONS),
    ),
    (r"original_max_position_embeddings", _constant(MAX_POSITIONS // 2)),
    (r"query_pre_attn_scalar", _constant(HEAD_DIM)),
    (r"state_size|ssm_state_size|mamba_d_state", _at_most(16)),
)
# Fields that some classes leave unset and their models then need.
UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}
_COMPILED_RULES = tuple((re.compile(pattern), rule) for pattern, rule in RULES)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")


def small_config(model_type: str) -> PreTrainedConfig:
    """Return a small, valid configuration of a registered type; raises what the configuration class raises."""
    config_class = CONFIG_MAPPING[model_type]
    return _shrink(config_class, OVERRIDES.get(model_type, {}))


def _shrink(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    return config_class(**_small_fields(config_class, overrides))


def _small_fields(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a small instance: rules, then per-layer lists, nested configurations, overrides."""
    defaults = _field_defaults(config_class)
    fields: dict[str, Any] = {}
    for name, default in defaults.items():
        small = _small_value(name, default, defaults)
        if small is not default:
            fields[name] = small
    fields |= _special_tokens(defaults)
    fields |= _representative_layers(config_class, defaults)
    nested = _nested_fields(config_class)
    own = {name: value for name, value in overrides.items() if name not in nested}
    for name, optional in nested.items():
        wanted = overrides.get(name, {})
        if wanted is None or (optional and not wanted):
            continue  # an optional vision or audio tower stays away
        fields[name] = _nested(config_class, name, wanted)
    return fields | own


def _nested_fields(config_class: type[PreTrainedConfig]) -> dict[str, bool]:
    """Names of the nested configurations, and whether each may be left out."""
    if hasattr(config_class, "sub_configs_defaults"):
        return {name: spec.optional for name, spec in config_class.sub_configs_defaults.items()}
    # Older releases of transformers: what a default instance leaves out may be left out.
    return {name: getattr(config_class(), name, None) is None for name in config_class.sub_configs}


def _nested(config_class: type[PreTrainedConfig], name: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A small nested configuration of the class that the default instance has there."""
    nested_type = overrides.get("model_type")
    nested_class = CONFIG_MAPPING[nested_type] if nested_type else type(getattr(config_class(), name))
    return _shrink(nested_class, {key: value for key, value in overrides.items() if key != "model_type"})


def _field_defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Default of every field that the class adds to the common base."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    defaults = {}
    for field in dataclasses.fields(config_class):
        if field.name in common or not field.init:
            continue
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def _small_value(name: str, default: Any, defaults: dict[str, Any]) -> Any:
    if name in ("is_decoder", "causal"):
        return True  # encoders that can decode: the registry's causal use
    if name in ("use_cache", "add_cross_attention"):
        return False
    if default is None:
        return UNSET.get(name)
    if isinstance(default, bool) or not isinstance(default, int):
        return default
    for pattern, rule in _COMPILED_RULES:
        if pattern.fullmatch(name):
            return rule(default, defaults)
    return default


def _special_tokens(defaults: dict[str, Any]) -> dict[str, int | list[int]]:
    """Move special tokens under `RESERVED_TOKENS`, one id each, so that no text token is one."""
    free = iter(range(RESERVED_TOKENS - 1, 2, -1))

    def small(token: int) -> int:
        return token if token < 3 else next(free)

    moved: dict[str, int | list[int]] = {}
    for name, default in defaults.items():
        if not re.fullmatch(r"\w+_token_(id|index)|(mask|unk)_index", name) or default is None:
            continue
        moved[name] = [small(token) for token in default] if isinstance(default, (list, tuple)) else small(default)
    return moved


def _representative_layers(config_class: type[PreTrainedConfig], defaults: dict[str, Any]) -> dict[str, Any]:
    """One layer of every kind: where the default instance has lists with an entry per layer, keep distinct entries.

    Layers are chosen by the first appearance of each combination of entries over all such lists, and filled up to
    `MIN_LAYERS` with the following ones.
    """
    count_name = next((name for name in _LAYER_COUNTS if name in defaults), None)
    if count_name is None:
        return {}
    default_config = config_class()
    count = defaults[count_name]
    lists = {
        name: value
        for name in defaults
        if isinstance(value := vars(default_config).get(name), (list, tuple)) and len(value) == count
    }
    if not lists:
        return {}
    combinations = [tuple(map(str, entries)) for entries in zip(*lists.values(), strict=True)]
    chosen = sorted({combinations.index(combination) for combination in set(combinations)})
    others = [index for index in range(count) if index not in chosen]
    chosen = sorted(chosen + others[: max(0, MIN_LAYERS - len(chosen))])
    return {count_name: len(chosen)} | {name: [value[i] for i in chosen] for name, value in lists.items()}
