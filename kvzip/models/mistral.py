"""Mistral: HF `config.json` to ModelConfig. Its tensors are named as Llama's."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .fields import optional_integer, with_defaults
from .llama import plain_decoder
from .rope_fields import shared_rope

_DEFAULTS = {  # of the HF class
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


def translate(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Mistral `config.json`: a Llama with a window in every layer, if any."""
    raw = with_defaults(raw, _DEFAULTS, nullable=("sliding_window",))
    window = optional_integer(raw, "sliding_window")
    ropes = shared_rope(raw, rope, by_layer_type=False)
    return plain_decoder(raw, ropes, family="mistral", window=window, windowed=lambda layer: window is not None)
