"""Gemma 2 and Gemma 3 text models: HF `config.json` to ModelConfig, HF tensor names to our fields."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import fields, llama
from .config import ModelConfig, check_number
from .rope_fields import Parameters, gemma3_rope, shared_rope

LAYER_NAMES = {
    **llama.LAYER_NAMES,
    "attn_post_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_post_norm": ("post_feedforward_layernorm.weight",),
}

_NULLABLE = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")  # null switches them off
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
    raw = fields.with_defaults(raw, defaults, nullable=_NULLABLE)
    return _gemma(raw, shared_rope(raw, rope, by_layer_type=True), family="gemma2", qk_norm=False, period=2)


def translate_gemma3_text(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Gemma 3 text model's `config.json`.

    Every sixth layer is global, with its own RoPE base and the config's scaling; the others have a window.
    """
    defaults = {**_DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6}
    raw = fields.with_defaults(raw, defaults, nullable=_NULLABLE)
    fields.reject(raw, attn_logit_softcapping=(None,))
    period = fields.read_integer(raw, "sliding_window_pattern")
    return _gemma(raw, gemma3_rope(raw, rope), family="gemma3", qk_norm=True, period=period)


def translate_gemma3(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of the text part of a multimodal Gemma 3 `config.json`.

    `tie_word_embeddings` is read beside `text_config`, never inside it: the LM head belongs to the whole model.
    """
    text = fields.read_mapping(raw, "text_config")
    fields.reject(text, quantization_config=(None,), is_causal=(None, True))
    tied = "tie_word_embeddings" not in raw or fields.read_flag(raw, "tie_word_embeddings")  # null is false there
    return translate_gemma3_text({**text, "tie_word_embeddings": tied}, rope)


def _gemma(
    raw: Mapping[str, Any], ropes: Mapping[str, Parameters], *, family: str, qk_norm: bool, period: int
) -> ModelConfig:
    """A Llama with other norms, scales and softcaps, in which all but every `period`-th layer have a window."""
    fields.reject(raw, use_bidirectional_attention=(None, False))
    bias = fields.read_flag(raw, "attention_bias")
    config = llama.plain_decoder(
        raw,
        ropes,
        family=family,
        window=fields.optional_integer(raw, "sliding_window"),
        windowed=lambda layer: (layer + 1) % period != 0,
        layer_types=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    )
    return replace(
        config,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=qk_norm,
        norm_offset=1,
        embed_scale=config.hidden_size**0.5,
        attn_scale=check_number("query_pre_attn_scalar", raw["query_pre_attn_scalar"], above=0.0) ** -0.5,
        attn_softcap=fields.read_cap(raw, "attn_logit_softcapping"),
        logit_softcap=fields.read_cap(raw, "final_logit_softcapping"),
        post_norms=True,
        warn_length=None,
    )
