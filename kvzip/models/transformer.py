"""The one forward pass. What happens to q, k and v is the caller's `attend`; nothing here knows that caches exist."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from ..prompts import ChatTemplate
from .config import ModelConfig
from .rope import cos_sin, rotate
from .weights import LayerWeights, Weights

logger = logging.getLogger(__name__)

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q [B Hq T D], k [B H T D], v [B H T D]) -> [B Hq T D]; q, k normed and rotated, q not scaled."""


@dataclass(frozen=True)
class Model:
    """A loaded model. `tokenizer` and `template` are None where the directory has none.

    `stop_ids` end an answer; `fingerprint` ties caches to these weights in this dtype.
    """

    config: ModelConfig
    weights: Weights
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    fingerprint: str
    source: str


def forward(
    model: Model, token_ids: Int64[Tensor, "B T"], positions: Int64[Tensor, "*b T"], attend: Attend
) -> Float[Tensor, "B T M"]:
    """Returns the hidden states after the final norm. `attend` is called once per layer, in order.

    Positions are absolute, [T] for all questions or [B T].
    """
    hidden = _run(model, token_ids, positions, attend, whole=True)
    return rms_norm(hidden, model.weights.norm, model.config)


def run_attention(
    model: Model,
    token_ids: Int64[Tensor, "B T"],
    positions: Int64[Tensor, "*b T"],
    attend: Attend,
    *,
    observe: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Calls `attend` in every layer as `forward` does, and stops at the last one: nothing after it reaches a cache.

    `observe(layer, hidden [B T M])` is called with the input of each layer before its `attend` is.
    """
    _run(model, token_ids, positions, attend, whole=False, observe=observe)


def logits(model: Model, hidden: Float[Tensor, "*b M"]) -> Float[Tensor, "*b V"]:
    """Returns next-token logits of hidden states that `forward` returned."""
    out = F.linear(hidden, model.weights.unembed)
    cap = model.config.logit_softcap
    return out if cap is None else torch.tanh(out / cap) * cap


def rms_norm(x: Float[Tensor, "*b N"], weight: Float[Tensor, " N"], config: ModelConfig) -> Float[Tensor, "*b N"]:
    """Returns x / rms(x) * (norm_offset + weight) over the last axis, in float32; Gemma casts after the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.norm_eps)
    if config.norm_offset:
        return (normed * (config.norm_offset + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def _run(
    model: Model,
    token_ids: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    whole: bool,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    config, weights = model.config, model.weights
    hidden = F.embedding(token_ids, weights.embed)
    if config.embed_scale != 1.0:
        hidden = hidden * torch.tensor(config.embed_scale, dtype=hidden.dtype)
    tables = {rope: cos_sin(rope, positions, config.head_dim, hidden.dtype) for rope in {s.rope for s in config.layers}}
    for index, (spec, layer) in enumerate(zip(config.layers, weights.layers, strict=True)):
        if observe is not None:
            observe(index, hidden)
        q, k, v = _project(config, layer, rms_norm(hidden, layer.attn_norm, config), tables[spec.rope])
        attended = attend(index, q, k, v)
        if not whole and index == len(config.layers) - 1:
            return hidden
        out = F.linear(rearrange(attended, "b h t d -> b t (h d)"), layer.o, layer.o_bias)
        hidden = hidden + _post_norm(out, layer.attn_post_norm, config)
        out = _mlp(config, layer, rms_norm(hidden, layer.mlp_norm, config))
        hidden = hidden + _post_norm(out, layer.mlp_post_norm, config)
    return hidden


def _project(
    config: ModelConfig, layer: LayerWeights, hidden: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv = rearrange(F.linear(hidden, layer.qkv, layer.qkv_bias), "b t (h d) -> b h t d", d=config.head_dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, config), rms_norm(k, layer.k_norm, config)
    return rotate(q, *tables), rotate(k, *tables), v


def _mlp(config: ModelConfig, layer: LayerWeights, hidden: Tensor) -> Tensor:
    gate, up = F.linear(hidden, layer.gate_up).chunk(2, dim=-1)
    activated = F.silu(gate) if config.activation == "silu" else F.gelu(gate, approximate="tanh")
    return F.linear(activated * up, layer.down)


def _post_norm(x: Tensor, weight: Tensor | None, config: ModelConfig) -> Tensor:
    return x if weight is None else rms_norm(x, weight, config)
