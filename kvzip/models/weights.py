"""Weights as named tensors, and the HF tensor that fills each part of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import QuantizedWeight
from ..ops.weights import GROUP, empty_weight
from .config import ModelConfig

SKIPPED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Tensors of a multimodal checkpoint that a text model does not read."""

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"

LINEAR = ("qkv", "o", "gate_up", "down")
"""Fields of LayerWeights that are matrices, which may be quantized."""

WRAPPERS = ("language_model.model.", "model.language_model.", "language_model.", "model.")
"""Prefixes of the decoder's tensor names, in the spellings that checkpoints use."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. q, k, v and gate, up are stacked by rows, so that each is one product."""

    attn_norm: Tensor
    qkv: Tensor | QuantizedWeight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor | QuantizedWeight
    o_bias: Tensor | None
    attn_post_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight
    mlp_post_norm: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All weights. `unembed is embed` where the embedding is tied."""

    embed: Tensor | QuantizedWeight
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    unembed: Tensor | QuantizedWeight


def empty_weights(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, head: int | None = None
) -> Weights:
    """Returns uninitialised weights of the right shapes; on the meta device they cost nothing.

    Args:
        head: rows of a head that is not tied, where it has not the whole vocabulary.
    """

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, width = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * width, config.num_kv_heads * width
    embed = new(config.vocab_size, hidden)
    layers = tuple(
        LayerWeights(
            attn_norm=new(hidden),
            qkv=new(q_rows + 2 * kv_rows, hidden),
            qkv_bias=new(q_rows + 2 * kv_rows) if config.qkv_bias else None,
            q_norm=new(width) if config.qk_norm else None,
            k_norm=new(width) if config.qk_norm else None,
            o=new(hidden, q_rows),
            o_bias=new(hidden) if config.o_bias else None,
            attn_post_norm=new(hidden) if config.post_norms else None,
            mlp_norm=new(hidden),
            gate_up=new(2 * config.intermediate_size, hidden),
            down=new(hidden, config.intermediate_size),
            mlp_post_norm=new(hidden) if config.post_norms else None,
        )
        for _ in config.layers
    )
    unembed = embed if config.tied else new(config.vocab_size if head is None else head, hidden)
    return Weights(embed=embed, layers=layers, norm=new(hidden), unembed=unembed)


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, *, kind: str | None = None, head: str | None = None, group: int = GROUP
) -> int:
    """Returns the bytes of a model's weights, its linear layers in codes of a kind, embedding and head in `dtype`.

    Args:
        head: a kind for the head too, and for the embedding where it is tied.
        group: inputs that share a scale in 4 bits; in 8 bits an output's all do.
    """
    total = 0
    for name, weight in named_weights(empty_weights(config, dtype=dtype, device="meta")):
        own = kind if name.rpartition(".")[2] in LINEAR else None
        if name == ("embed" if config.tied else "unembed"):
            own = head
        if own is not None:
            outputs, inputs = weight.shape
            scale_dtype = torch.float16 if own == "int4" else torch.float32
            size = group if own == "int4" else inputs
            weight = empty_weight(outputs, inputs, kind=own, group=size, scale_dtype=scale_dtype, device="meta")
        total += weight.nbytes
    return total


def named_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every distinct weight, in a fixed order: of quantized ones codes, scales, zeros."""
    for name, weight in named_weights(weights):
        if isinstance(weight, Tensor):
            yield name, weight
        else:
            parts = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero}
            yield from ((f"{name}.{part}", tensor) for part, tensor in parts.items() if tensor is not None)


def named_weights(weights: Weights) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Yields (name, weight) of every distinct weight, in a fixed order."""
    yield "embed", weights.embed
    for index, layer in enumerate(weights.layers):
        for name, weight in vars(layer).items():
            if weight is not None:
                yield f"layers.{index}.{name}", weight
    yield "norm", weights.norm
    if weights.unembed is not weights.embed:
        yield "unembed", weights.unembed


def slots(config: ModelConfig, weights: Weights, layer_names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Returns the view that each HF tensor fills, by its name below the decoder's wrapper; quantized ones have none."""
    found = {"norm.weight": weights.norm}
    if isinstance(weights.embed, Tensor):
        found[EMBED] = weights.embed
    if not config.tied and isinstance(weights.unembed, Tensor):
        found[HEAD] = weights.unembed
    q_rows, kv_rows = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    rows = {"qkv": [q_rows, kv_rows, kv_rows], "gate_up": [config.intermediate_size] * 2}
    rows["qkv_bias"] = rows["qkv"]
    for index, layer in enumerate(weights.layers):
        for field, names in layer_names.items():
            tensor = getattr(layer, field)
            if not isinstance(tensor, Tensor):
                continue
            parts = tensor.split(rows[field]) if field in rows else (tensor,)
            found |= {f"layers.{index}.{name}": part for name, part in zip(names, parts, strict=True)}
    return found


def short_name(name: str) -> str | None:
    """The tensor's name below the decoder's wrapper, or None for one that is skipped on purpose."""
    if name.startswith(SKIPPED) or name.endswith(".rotary_emb.inv_freq"):
        return None
    if name in (HEAD, f"language_model.{HEAD}"):
        return HEAD
    return next((name.removeprefix(wrapper) for wrapper in WRAPPERS if name.startswith(wrapper)), name)
