"""Gemma 2 and Gemma 3 text models: HF `config.json` to ModelConfig, HF tensor names to our fields."""

from collections.abc import Mapping
from typing import Any

from .config import LayerSpec, ModelConfig, merged_rope, read_activation, read_rope, read_windows, reject
from .llama import LAYER_NAMES as LLAMA_NAMES

LAYER_NAMES = {
    **LLAMA_NAMES,
    "attn_post_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_post_norm": ("post_feedforward_layernorm.weight",),
}

_DEFAULTS = {  # of both HF text config classes
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def translate_gemma2(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a Gemma 2 `config.json`: softcaps, a window in every other layer."""
    raw = {
        **_DEFAULTS,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        **raw,
    }
    theta = raw.get("rope_theta") or 10_000.0
    return _gemma(raw, family="gemma2", qk_norm=False, period=2, local_theta=theta, global_theta=10_000.0)


def translate_gemma3(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a Gemma 3 `config.json`, a text model's or the multimodal one's text part.

    Every sixth layer is global, with its own RoPE base and the config's scaling; the others have a window.
    """
    outer = raw
    raw = raw.get("text_config", raw)
    raw = {**_DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072, **raw}
    if "text_config" in outer:
        reject(outer, quantization_config=(None,))
        raw["tie_word_embeddings"] = outer.get("tie_word_embeddings", True)
        raw["rope_scaling"] = outer.get("rope_scaling") or raw.get("rope_scaling")
    reject(raw, attn_logit_softcapping=(None,))
    local = raw.get("rope_local_base_freq") or 10_000.0
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    return _gemma(raw, family="gemma3", qk_norm=True, period=period, local_theta=local, global_theta=1_000_000.0)


def _gemma(
    raw: Mapping[str, Any], *, family: str, qk_norm: bool, period: int, local_theta: float, global_theta: float
) -> ModelConfig:
    reject(raw, use_bidirectional_attention=(None, False))
    count, max_length = raw["num_hidden_layers"], raw["max_position_embeddings"]
    bias = bool(raw.get("attention_bias", False))
    windows = read_windows(
        raw,
        default=["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)],
        window=raw["sliding_window"],
    )
    wide = read_rope(merged_rope(raw, "full_attention", theta=global_theta), max_length=max_length)
    # a window layer takes the scaling of its own layer type only, which the older spelling cannot express
    narrow_raw = {"rope_parameters": raw.get("rope_parameters"), "rope_theta": local_theta}
    narrow = read_rope(merged_rope(narrow_raw, "sliding_attention", theta=local_theta), max_length=max_length)
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        layers=tuple(LayerSpec(window=w, rope=narrow if w else wide) for w in windows),
        norm_eps=raw["rms_norm_eps"],
        norm_offset=1,
        activation=read_activation(raw, "hidden_activation", "gelu_pytorch_tanh"),
        embed_scale=raw["hidden_size"] ** 0.5,
        attn_scale=raw["query_pre_attn_scalar"] ** -0.5,
        attn_softcap=raw.get("attn_logit_softcapping"),
        logit_softcap=raw.get("final_logit_softcapping"),
        max_length=max_length,
        tied=bool(raw["tie_word_embeddings"]),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=qk_norm,
        post_norms=True,
    )
