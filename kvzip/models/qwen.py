"""Qwen2.5 and Qwen3: HF `config.json` to ModelConfig. Their tensors are named as Llama's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import fields, llama
from .config import ModelConfig
from .rope_fields import shared_rope

_NULLABLE = ("sliding_window", "num_key_value_heads")
_DEFAULTS = {  # of both HF classes
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def translate_qwen2(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Qwen2 or Qwen2.5 `config.json`: a Llama with biases on q, k and v.

    Dual chunk attention (the -1M models) is left out, as the method's authors do; see `ModelConfig.warn_length`.
    """
    config = _qwen(fields.with_defaults(raw, _DEFAULTS, nullable=_NULLABLE), rope, family="qwen2")
    return replace(config, qkv_bias=True)


def translate_qwen3(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Qwen3 `config.json`: RMSNorm on q and k, head width given, YaRN only if asked."""
    raw = fields.with_defaults(raw, {**_DEFAULTS, "head_dim": 128}, nullable=_NULLABLE)
    bias = fields.read_flag(raw, "attention_bias")
    return replace(_qwen(raw, rope, family="qwen3"), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _qwen(raw: Mapping[str, Any], rope: Mapping[str, Any] | None, *, family: str) -> ModelConfig:
    has_window = fields.read_flag(raw, "use_sliding_window") and raw["sliding_window"] is not None
    first = fields.read_integer(raw, "max_window_layers", low=0)
    return llama.plain_decoder(
        raw,
        shared_rope(raw, rope, by_layer_type=True),
        family=family,
        window=fields.read_integer(raw, "sliding_window") if has_window else None,
        windowed=lambda layer: has_window and layer >= first,
        layer_types=True,
    )
