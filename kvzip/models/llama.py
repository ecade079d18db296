"""Llama 3, 3.1, 3.2: HF `config.json` to ModelConfig, HF tensor names to our fields."""

from collections.abc import Mapping
from typing import Any

from .config import LayerSpec, ModelConfig, merged_rope, read_activation, read_rope, read_windows, reject

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


_LLAMA_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def translate(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a Llama `config.json`. Raises ValueError for what kvzip does not implement."""
    reject(raw, mlp_bias=(None, False))
    bias = bool(raw.get("attention_bias", False))
    return plain_decoder({**_LLAMA_DEFAULTS, **raw}, family="llama", qkv_bias=bias, o_bias=bias)


def plain_decoder(
    raw: Mapping[str, Any],
    *,
    family: str,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    first_window_layer: int = 0,
) -> ModelConfig:
    """Returns the ModelConfig that Llama, Qwen and Mistral share: RMSNorm, RoPE, GQA, SwiGLU.

    Layers from `first_window_layer` on have the window, if there is one, unless `layer_types` says otherwise.
    """
    heads, count = raw["num_attention_heads"], raw["num_hidden_layers"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    max_length = raw["max_position_embeddings"]
    rope = read_rope(merged_rope(raw, "full_attention", theta=10_000.0), max_length=max_length)
    windows = read_windows(
        raw,
        default=["sliding_attention" if window and i >= first_window_layer else "full_attention" for i in range(count)],
        window=window,
    )
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(window=w, rope=rope) for w in windows),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        norm_offset=0,
        activation=read_activation(raw, "hidden_act", "silu"),
        embed_scale=1.0,
        attn_scale=head_dim**-0.5,
        attn_softcap=None,
        logit_softcap=None,
        max_length=max_length,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        warn_length=(raw.get("dual_chunk_attention_config") or {}).get("original_max_position_embeddings"),
    )
