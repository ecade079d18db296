"""Qwen2.5 and Qwen3: HF `config.json` to ModelConfig. Their tensors are named as Llama's."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .llama import plain_decoder

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


def translate_qwen2(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a Qwen2 or Qwen2.5 `config.json`: a Llama with biases on q, k and v.

    Dual chunk attention (the -1M models) is left out, as the method's authors do; see `ModelConfig.warn_length`.
    """
    return _qwen({**_DEFAULTS, **raw}, family="qwen2", qkv_bias=True)


def translate_qwen3(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a Qwen3 `config.json`: RMSNorm on q and k, head width given, YaRN only if asked."""
    raw = {**_DEFAULTS, "head_dim": 128, **raw}
    bias = bool(raw.get("attention_bias", False))
    return _qwen(raw, family="qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True)


def _qwen(
    raw: Mapping[str, Any], *, family: str, qkv_bias: bool, o_bias: bool = False, qk_norm: bool = False
) -> ModelConfig:
    return plain_decoder(
        raw,
        family=family,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        window=raw["sliding_window"] if raw.get("use_sliding_window") else None,
        first_window_layer=raw["max_window_layers"],
    )
