"""Weights as named tensors, the HF tensor that fills each part of them, and safetensors read straight into place."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig

SKIPPED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Tensors of a multimodal checkpoint that a text model does not read."""

WRAPPERS = ("language_model.model.", "model.language_model.", "language_model.", "model.")
"""What stands in front of the decoder's tensor names, in the spellings that checkpoints use."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. q, k, v and gate, up are stacked by rows, so that each is one product."""

    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    attn_post_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    mlp_post_norm: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All weights. `unembed is embed` where the embedding is tied."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    unembed: Tensor


def empty_weights(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> Weights:
    """Returns uninitialised weights of the right shapes; on the meta device they cost nothing."""

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
    return Weights(
        embed=embed, layers=layers, norm=new(hidden), unembed=embed if config.tied else new(config.vocab_size, hidden)
    )


def named_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every distinct weight, in a fixed order."""
    yield "embed", weights.embed
    for index, layer in enumerate(weights.layers):
        for field in fields(layer):
            tensor = getattr(layer, field.name)
            if tensor is not None:
                yield f"layers.{index}.{field.name}", tensor
    yield "norm", weights.norm
    if weights.unembed is not weights.embed:
        yield "unembed", weights.unembed


def slots(config: ModelConfig, weights: Weights, layer_names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Returns the view that each HF tensor fills, by its name below the decoder's wrapper."""
    found = {"embed_tokens.weight": weights.embed, "norm.weight": weights.norm}
    if not config.tied:
        found["lm_head.weight"] = weights.unembed
    q_rows, kv_rows = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    rows = {"qkv": [q_rows, kv_rows, kv_rows], "gate_up": [config.intermediate_size] * 2}
    rows["qkv_bias"] = rows["qkv"]
    for index, layer in enumerate(weights.layers):
        for field, names in layer_names.items():
            tensor = getattr(layer, field)
            if tensor is None:
                continue
            parts = tensor.split(rows[field]) if field in rows else (tensor,)
            found |= {f"layers.{index}.{name}": part for name, part in zip(names, parts, strict=True)}
    return found


def read_weights(
    directory: Path,
    config: ModelConfig,
    layer_names: Mapping[str, tuple[str, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """Returns the weights of an HF directory, one tensor at a time, cast to `dtype` on `device`.

    Host memory holds at most one mapped shard besides what `device` itself needs.

    Raises: FileNotFoundError without safetensors; ValueError that names a damaged file, or a tensor that is
    unknown, missing, given twice or of the wrong shape.
    """
    weights = empty_weights(config, dtype=dtype, device=device)
    missing = slots(config, weights, layer_names)
    known = set(missing)
    for path in _shards(directory):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    short = _short_name(name, config)
                    if short is None:
                        continue
                    if short not in missing:
                        what = (
                            "a tensor given once, got it twice"
                            if short in known
                            else "only tensors of the model, got one it does not read"
                        )
                        raise ValueError(f"expected {what}: {name!r} in {path.name}; is config.json this checkpoint's?")
                    slot = missing.pop(short)
                    shape = shard.get_slice(name).get_shape()
                    if shape != list(slot.shape):
                        raise ValueError(
                            f"expected {name!r} of shape {list(slot.shape)}, got {shape} in {path.name}: "
                            "config.json and the weights do not belong together"
                        )
                    slot.copy_(shard.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(
                f"expected a whole safetensors file, got {path.name} of {path.stat().st_size} bytes ({error}): "
                "it is truncated or damaged, fetch it again"
            ) from error
    if missing:
        raise ValueError(
            f"expected {len(known)} tensors, got {len(known) - len(missing)}: {min(missing)!r} is missing "
            "from the safetensors files; is the checkpoint complete, and config.json its own?"
        )
    return weights


def fingerprint(config: ModelConfig, weights: Weights, dtype: torch.dtype) -> str:
    """Returns a hex digest of the config, the dtype and 64 values sampled from every weight."""
    digest = hashlib.sha256(f"{config!r} {dtype}".encode())
    digest.update(sampled(weights).numpy().tobytes())
    return digest.hexdigest()[:32]


def sampled(weights: Weights) -> Tensor:
    """Returns up to 64 values of every weight, in a fixed order, in float32 on the CPU."""
    samples = []
    for _, tensor in named_tensors(weights):
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // 64)
        samples.append(flat[::step][:64].float())
    return torch.cat(samples).cpu()


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [directory / name for name in names]
        absent = [path.name for path in paths if not path.exists()]
        if absent:
            raise FileNotFoundError(
                f"expected the {len(paths)} shards that {index.name} lists in {directory}, "
                f"got no {absent[0]}: the download is incomplete"
            )
        return paths
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"expected *.safetensors in {directory}, got none: kvzip reads safetensors only, convert the checkpoint"
        )
    return paths


def _short_name(name: str, config: ModelConfig) -> str | None:
    """The tensor's name below the decoder's wrapper, or None for one that is skipped on purpose."""
    if name.startswith(SKIPPED) or name.endswith(".rotary_emb.inv_freq"):
        return None
    if name.endswith("lm_head.weight"):
        return None if config.tied else "lm_head.weight"
    for wrapper in WRAPPERS:
        if name.startswith(wrapper):
            return name.removeprefix(wrapper)
    return name
