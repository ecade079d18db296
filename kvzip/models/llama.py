"""Llama 3, 3.1, 3.2 and Mistral: HF `config.json` to ModelConfig, HF tensor names to our fields."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from . import fields
from .config import MOST_LAYERS, LayerSpec, ModelConfig, check_number
from .rope_fields import FULL, SLIDING, Parameters, read_ropes, shared_rope

LAYER_NAMES = {
    "attn_norm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "o_bias": ("self_attn.o_proj.bias",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
"""Field of LayerWeights -> the HF tensors stacked in it, names below `model.layers.N.`"""

_DEFAULTS = {  # of both HF classes
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL_DEFAULTS = _DEFAULTS | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


def translate_llama(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Llama `config.json`. Raises ValueError for what kvzip does not implement."""
    fields.reject(raw, mlp_bias=(None, False))
    raw, bias = fields.with_defaults(raw, _DEFAULTS), fields.read_flag(raw, "attention_bias")
    config = plain_decoder(raw, shared_rope(raw, rope, by_layer_type=False), family="llama")
    return replace(config, qkv_bias=bias, o_bias=bias)


def translate_mistral(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the ModelConfig of a Mistral `config.json`: a Llama with a window in every layer, if any."""
    raw = fields.with_defaults(raw, _MISTRAL_DEFAULTS, nullable=("sliding_window",))
    window = fields.optional_integer(raw, "sliding_window")
    ropes = shared_rope(raw, rope, by_layer_type=False)
    return plain_decoder(raw, ropes, family="mistral", window=window, windowed=lambda layer: window is not None)


def plain_decoder(
    raw: Mapping[str, Any],
    ropes: Mapping[str, Parameters],
    *,
    family: str,
    window: int | None = None,
    windowed: Callable[[int], bool] = lambda layer: False,
    layer_types: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> ModelConfig:
    """Returns the ModelConfig of a decoder with RMSNorm, RoPE, GQA and a gated MLP, as Llama's is, without biases.

    Args:
        ropes: the RoPE parameters of each layer type, as `shared_rope` and `gemma3_rope` return them.
        windowed: whether the layer of an index has the window, if the file has no `layer_types`.
        layer_types: whether `layer_types` may differ from `windowed`.
        activation: the field that names the activation, and its default.
    """
    heads, hidden = fields.read_integer(raw, "num_attention_heads"), fields.read_integer(raw, "hidden_size")
    head_dim = fields.optional_integer(raw, "head_dim") or hidden // heads
    if head_dim < 1:
        raise ValueError(
            f"expected hidden_size in config.json of at least num_attention_heads, got {hidden} and {heads}"
        )
    specs, max_length = read_ropes(ropes, max_length=fields.read_integer(raw, "max_position_embeddings"))
    count = fields.read_integer(raw, "num_hidden_layers", high=MOST_LAYERS)  # small enough to make a list of
    types = [SLIDING if windowed(layer) else FULL for layer in range(count)]
    windows = fields.read_windows(raw, default=types, window=window, fixed=not layer_types)
    return ModelConfig(
        family=family,
        vocab_size=fields.read_integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.read_integer(raw, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.optional_integer(raw, "num_key_value_heads") or heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(window=w, rope=specs[SLIDING if w else FULL]) for w in windows),
        norm_eps=check_number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), above=0.0),
        norm_offset=0,
        activation=fields.read_activation(raw, *activation),
        embed_scale=1.0,
        attn_scale=head_dim**-0.5,
        attn_softcap=None,
        logit_softcap=None,
        max_length=max_length,
        tied=fields.read_flag(raw, "tie_word_embeddings"),
        warn_length=fields.optional_integer(
            fields.read_mapping(raw, "dual_chunk_attention_config"), "original_max_position_embeddings"
        ),
    )
