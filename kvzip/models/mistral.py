"""Mistral: HF `config.json` to ModelConfig. Its tensors are named as Llama's."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .llama import plain_decoder

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


def translate(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a Mistral `config.json`: a Llama with a window in every layer, if any."""
    raw = {**_DEFAULTS, **raw}
    return plain_decoder(raw, family="mistral", window=raw["sliding_window"])
