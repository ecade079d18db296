"""Gemma 2 and Gemma 3 text models: HF `config.json` to ModelConfig, HF tensor names to our fields."""

from collections.abc import Mapping
from typing import Any

from .config import LayerSpec, ModelConfig, check_number
from .fields import (
    read_activation,
    read_cap,
    read_flag,
    read_integer,
    read_layer_count,
    read_mapping,
    read_windows,
    reject,
    with_defaults,
)
from .llama import LAYER_NAMES as LLAMA_NAMES
from .rope_fields import FULL, SLIDING, Parameters, gemma3_rope, read_ropes, shared_rope

LAYER_NAMES = {
    **LLAMA_NAMES,
    "attn_post_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_post_norm": ("post_feedforward_layernorm.weight",),
}

_NULLABLE = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")  # null is no default's there
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


def translate_gemma2(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Gemma 2 `config.json`: softcaps, a window in every other layer."""
    defaults = {
        **_DEFAULTS,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    raw = with_defaults(raw, defaults, nullable=_NULLABLE)
    return _gemma(raw, shared_rope(raw, rope, by_layer_type=True), family="gemma2", qk_norm=False, period=2)


def translate_gemma3_text(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Gemma 3 text model's `config.json`.

    Every sixth layer is global, with its own RoPE base and the config's scaling; the others have a window.
    """
    defaults = {**_DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6}
    raw = with_defaults(raw, defaults, nullable=_NULLABLE)
    reject(raw, attn_logit_softcapping=(None,))
    period = read_integer(raw, "sliding_window_pattern")
    return _gemma(raw, gemma3_rope(raw, rope), family="gemma3", qk_norm=True, period=period)


def translate_gemma3(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of the text part of a multimodal Gemma 3 `config.json`.

    Only `tie_word_embeddings` is read beside `text_config`, and only there: the head belongs to the whole model.
    """
    text = read_mapping(raw, "text_config")
    reject(text, quantization_config=(None,), is_causal=(None, True))
    absent = "tie_word_embeddings" not in raw  # null says no there
    return translate_gemma3_text({**text, "tie_word_embeddings": absent or read_flag(raw, "tie_word_embeddings")}, rope)


def _gemma(
    raw: Mapping[str, Any], parameters: Mapping[str, Parameters], *, family: str, qk_norm: bool, period: int
) -> ModelConfig:
    reject(raw, use_bidirectional_attention=(None, False))
    count = read_layer_count(raw)
    bias, hidden = read_flag(raw, "attention_bias"), read_integer(raw, "hidden_size")
    windows = read_windows(
        raw,
        default=[FULL if (i + 1) % period == 0 else SLIDING for i in range(count)],
        window=None if raw["sliding_window"] is None else read_integer(raw, "sliding_window"),
    )
    specs, max_length = read_ropes(parameters, max_length=read_integer(raw, "max_position_embeddings"))
    return ModelConfig(
        family=family,
        vocab_size=read_integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=read_integer(raw, "intermediate_size"),
        num_heads=read_integer(raw, "num_attention_heads"),
        num_kv_heads=read_integer(raw, "num_key_value_heads"),
        head_dim=read_integer(raw, "head_dim"),
        layers=tuple(LayerSpec(window=w, rope=specs[SLIDING if w else FULL]) for w in windows),
        norm_eps=check_number("rms_norm_eps", raw["rms_norm_eps"], above=0.0),
        norm_offset=1,
        activation=read_activation(raw, "hidden_activation", "gelu_pytorch_tanh"),
        embed_scale=hidden**0.5,
        attn_scale=check_number("query_pre_attn_scalar", raw["query_pre_attn_scalar"], above=0.0) ** -0.5,
        attn_softcap=read_cap(raw, "attn_logit_softcapping"),
        logit_softcap=read_cap(raw, "final_logit_softcapping"),
        max_length=max_length,
        tied=read_flag(raw, "tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=qk_norm,
        post_norms=True,
    )
