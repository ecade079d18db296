"""Weights as named tensors, the HF tensor that fills each part of them, and safetensors read straight into place."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig
from .identity import StoredTensor, checkpoint_digest, stored_tensor

SKIPPED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Tensors of a multimodal checkpoint that a text model does not read."""

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"

WRAPPERS = ("language_model.model.", "model.language_model.", "language_model.", "model.")
"""Prefixes of the decoder's tensor names, in the spellings that checkpoints use."""


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
        for name, tensor in vars(layer).items():
            if tensor is not None:
                yield f"layers.{index}.{name}", tensor
    yield "norm", weights.norm
    if weights.unembed is not weights.embed:
        yield "unembed", weights.unembed


def slots(config: ModelConfig, weights: Weights, layer_names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Returns the view that each HF tensor fills, by its name below the decoder's wrapper."""
    found = {EMBED: weights.embed, "norm.weight": weights.norm}
    if not config.tied:
        found[HEAD] = weights.unembed
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
    files: Iterable[Path],
    config: ModelConfig,
    layer_names: Mapping[str, tuple[str, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Weights, str]:
    """Returns the weights in safetensors files, cast to `dtype` on `device`, and the digest of the checkpoint.

    Names and shapes are checked before anything is allocated. Besides the weights, host memory holds at most one mapped
    shard. If config.json ties the head to the embedding, they are one tensor where the files have only one of them or
    two equal ones; two different ones are kept apart, as in Transformers.

    Raises: ValueError that names a damaged file, or a tensor that is unknown, missing, given twice or of the wrong
    shape or type.
    """
    untied = replace(config, tied=False)
    shapes = slots(untied, empty_weights(untied, dtype=dtype, device="meta"), layer_names)
    found = _located(files, shapes)
    if config.tied:
        if EMBED not in found and HEAD in found:
            found[EMBED] = found.pop(HEAD)
        if EMBED in found and HEAD in found:
            config = replace(config, tied=_same(found[EMBED], found[HEAD], dtype))
        if config.tied:
            shapes.pop(HEAD)
    missing = sorted(set(shapes) - set(found))
    if missing:
        raise ValueError(
            f"expected {len(shapes)} tensors, got {len(shapes) - len(missing)}: {missing[0]!r} is missing "
            "from the safetensors files; is the checkpoint complete, and config.json its own?"
        )
    weights = empty_weights(config, dtype=dtype, device=device)
    return weights, checkpoint_digest(_filled(found, slots(config, weights, layer_names)))


def _located(files: Iterable[Path], shapes: Mapping[str, Tensor]) -> dict[str, tuple[Path, str]]:
    """The file of each tensor and its name there, by its name below the wrapper, in the order of the files."""
    found: dict[str, tuple[Path, str]] = {}
    for path in files:
        with _opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                short = _short_name(name)
                if short is None:
                    continue
                if short not in shapes or short in found:
                    unread = "only tensors of the model, got one it does not read"
                    what = "a tensor given once, got it twice" if short in found else unread
                    raise ValueError(f"expected {what}: {name!r} in {path.name}; is config.json this checkpoint's?")
                shape, stored = shard.get_slice(name).get_shape(), shard.get_slice(name).get_dtype()
                if shape != list(shapes[short].shape):
                    raise ValueError(
                        f"expected {name!r} of shape {list(shapes[short].shape)}, got {shape} in {path.name}: "
                        "config.json and the weights do not belong together"
                    )
                if not stored.startswith(("F", "BF")):
                    raise ValueError(
                        f"expected {name!r} of a floating type, got {stored} in {path.name}: "
                        "kvzip reads no quantized checkpoints, take one of 16 bits"
                    )
                found[short] = path, name
    return found


def _filled(found: Mapping[str, tuple[Path, str]], weights: Mapping[str, Tensor]) -> Iterator[StoredTensor]:
    """Copies every tensor into its place, file by file, and yields it as it is stored.

    A head tied to the embedding has no place of its own. It is yielded too: in the checkpoint's dtype the two may
    differ, and the digest must not depend on the dtype of the weights.
    """
    for path in dict.fromkeys(file for file, _ in found.values()):
        with _opened(path) as shard:
            for short, (file, name) in found.items():
                if file == path:
                    tensor = shard.get_tensor(name)
                    if short in weights:
                        weights[short].copy_(tensor)
                    yield stored_tensor(short, tensor)


def _same(embed: tuple[Path, str], head: tuple[Path, str], dtype: torch.dtype, rows: int = 4096) -> bool:
    """Whether two matrices of one shape are equal in `dtype`, read some rows at a time."""
    with _opened(embed[0]) as one, _opened(head[0]) as other:
        a, b = one.get_slice(embed[1]), other.get_slice(head[1])
        steps = range(0, a.get_shape()[0], rows)
        return all(torch.equal(a[i : i + rows].to(dtype), b[i : i + rows].to(dtype)) for i in steps)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(
            f"expected a whole safetensors file, got {path.name} of {path.stat().st_size} bytes ({error}): "
            "it is truncated or damaged, fetch it again"
        ) from error


def _short_name(name: str) -> str | None:
    """The tensor's name below the decoder's wrapper, or None for one that is skipped on purpose."""
    if name.startswith(SKIPPED) or name.endswith(".rotary_emb.inv_freq"):
        return None
    if name in (HEAD, f"language_model.{HEAD}"):
        return HEAD
    return next((name.removeprefix(wrapper) for wrapper in WRAPPERS if name.startswith(wrapper)), name)
