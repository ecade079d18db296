"""What a decoder-only transformer is, as data, and how the fields of an HF `config.json` are read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Activation = Literal["silu", "gelu_tanh"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of one layer. `models/rope.py` turns it into inverse frequencies.

    Lengths are in tokens. `attention_factor` multiplies cos and sin (YaRN; 1 otherwise).
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """What differs by layer. With a window, query i sees key j iff 0 <= i - j < window."""

    window: int | None
    rope: RopeSpec


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass needs to know besides weights.

    `max_length` is the number of positions the model was made for; `warn_length` the part of it that needs an
    attention we do not implement (dual chunk attention), beyond which one warning is logged.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    norm_offset: int
    activation: Activation
    embed_scale: float
    attn_scale: float
    attn_softcap: float | None
    logit_softcap: float | None
    max_length: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    warn_length: int | None = None


def require(raw: Mapping[str, Any], *keys: str) -> list[Any]:
    """Returns the values of `keys`. Raises ValueError that names the first missing one."""
    for key in keys:
        if raw.get(key) is None:
            raise ValueError(f"expected {key!r} in config.json, got no such field: is this a complete HF config?")
    return [raw[key] for key in keys]


def reject(raw: Mapping[str, Any], **harmless: tuple[Any, ...]) -> None:
    """Raises ValueError for a field that changes the arithmetic and has a value other than the harmless ones."""
    for key, allowed in harmless.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(
                f"expected config.json to have {key} in {list(allowed)}, got {raw[key]!r}: "
                "kvzip does not implement it, so its results would be wrong"
            )


def read_activation(raw: Mapping[str, Any], key: str, default: str) -> Activation:
    """Returns the activation named by `raw[key]`. Raises ValueError if it is unknown."""
    name = raw.get(key) or default
    if name not in ACTIVATIONS:
        raise ValueError(f"expected {key} to be one of {sorted(ACTIVATIONS)}, got {name!r}: not supported")
    return ACTIVATIONS[name]


def read_windows(raw: Mapping[str, Any], *, default: list[str], window: int | None) -> list[int | None]:
    """Returns each layer's window from `layer_types`, or from `default` where the file has none.

    Raises: ValueError for an unknown layer type or a list of another length.
    """
    types = raw.get("layer_types") or default
    if len(types) != len(default):
        raise ValueError(f"expected {len(default)} layer_types, one per layer, got {len(types)}")
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"expected layer_types of 'full_attention' or 'sliding_attention', got {unknown[0]!r}")
    if "sliding_attention" in types and not window:
        raise ValueError("expected a sliding_window for the sliding layers, got none: config.json is inconsistent")
    return [window if kind == "sliding_attention" else None for kind in types]


def merged_rope(raw: Mapping[str, Any], layer_type: str, *, theta: float) -> dict[str, Any]:
    """Returns the RoPE parameters of a layer type, read from either spelling of config.json.

    Transformers 4 has `rope_theta` and `rope_scaling`, Transformers 5 `rope_parameters` (nested by layer type
    where they differ). `theta` is the HF class's default base.
    """
    new = raw.get("rope_parameters") or {}
    new = new.get(layer_type) or {} if any(isinstance(v, Mapping) for v in new.values()) else new
    old = raw.get("rope_scaling") or {}
    base = new.get("rope_theta") or raw.get("rope_theta") or theta
    partial = {"partial_rotary_factor": raw["partial_rotary_factor"]} if "partial_rotary_factor" in raw else {}
    return {**partial, **old, **new, "rope_theta": base}


_ROPE_FIELDS = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
}


def read_rope(parameters: Mapping[str, Any], *, max_length: int) -> RopeSpec:
    """Returns the RopeSpec of a parameter dict in HF's form.

    Raises: ValueError for an unknown type, a partial rotation, an unknown field or a missing factor.
    Source: YaRN, arXiv 2309.00071; the llama3 rule is Llama 3.1's. Defaults are those of Transformers.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"expected rope_type 'default', 'linear', 'llama3' or 'yarn', got {kind!r}: not supported")
    reject(parameters, partial_rotary_factor=(None, 1, 1.0))
    unknown = sorted(set(parameters) - _ROPE_FIELDS)
    if unknown:
        raise ValueError(
            f"expected RoPE parameters that kvzip knows, got {unknown[0]!r}: remove it if it has no effect"
        )
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return RopeSpec(theta=theta)
    (factor,) = require(parameters, "factor")
    spec: dict[str, Any] = {"theta": theta, "kind": kind, "factor": float(factor)}
    if kind == "linear":
        return RopeSpec(**spec)
    spec["original_length"] = int(parameters.get("original_max_position_embeddings") or max_length)
    if kind == "llama3":
        low, high = require(parameters, "low_freq_factor", "high_freq_factor")
        return RopeSpec(**spec, low_freq_factor=float(low), high_freq_factor=float(high))
    return RopeSpec(
        **spec,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=_yarn_attention_factor(parameters, float(factor)),
    )


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    given, mscale, all_dim = (parameters.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
