"""A model's identity: a digest of the config fields that change its arithmetic and of samples of its checkpoint.

Samples are taken of each tensor as it is stored, under its name without the decoder's wrapper, before it is stacked,
cast, sharded or packed. So everyone who can read the checkpoint's tensors gets the same digest, in any order.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .config import ROPE_FIELDS, ModelConfig

_PLACES, _PLACE_BYTES = 64, 8

_LEFT_OUT = ("family", "layers", "max_length", "tied", "warn_length")
"""Fields of ModelConfig that do not change the arithmetic or are covered otherwise: `layers` by windows and RoPE,
`tied` by the checkpoint's digest."""

_STORED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: `dtype` as safetensors spells it (BF16), `read(start, stop)` gives its stored bytes.

    `name` stands below the decoder's wrapper, as `layers.0.mlp.up_proj.weight`, `embed_tokens.weight`,
    `norm.weight` and `lm_head.weight`. Elements are in row-major order, little endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    read: Callable[[int, int], bytes]


def stored_tensor(name: str, tensor: Tensor) -> StoredTensor:
    """Returns a tensor as a StoredTensor: what a checkpoint would hold of it in its dtype."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return StoredTensor(
        name=name,
        dtype=_STORED.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
        shape=tuple(tensor.shape),
        size_bytes=flat.numel(),
        read=lambda start, stop: flat[start:stop].cpu().numpy().tobytes(),
    )


def checkpoint_digest(tensors: Iterable[StoredTensor]) -> str:
    """Returns a hex digest of a checkpoint's tensors, the same in any order and without regard to files.

    Of each: name, dtype, shape, and 64 places of 8 bytes from its first to its last. A head that equals the embedding
    counts as tied, whether the file has it or not.
    """
    entries = {tensor.name: _entry(tensor) for tensor in tensors}
    head = entries.pop("lm_head.weight", None)
    if head is not None and head != entries.setdefault("embed_tokens.weight", head):
        entries["lm_head.weight"] = head
    return _digest(sorted(entries.items()))


def identity_of(config: ModelConfig, checkpoint: str) -> str:
    """Returns a hex digest of a model's shape and checkpoint: the same in every dtype, length and RoPE scaling."""
    names = [x.name for x in fields(config) if x.name not in _LEFT_OUT and getattr(config, x.name) != x.default]
    values = {name: _canonical(getattr(config, name)) for name in names}
    return _digest([values, [_canonical(spec.window) for spec in config.layers], checkpoint])


def fingerprint_of(config: ModelConfig, identity: str, dtype: torch.dtype, *, rounding: Sequence[str] = ()) -> str:
    """Returns a hex digest of an identity with its RoPE, a dash and the dtype, as `3f0c...-bfloat16`.

    Args:
        rounding: how the stored weights are rounded when they are read, and activations; caches of 16-bit and rounded
            weights are not the same.
    """
    ropes = [
        {name: _canonical(getattr(spec.rope, name)) for name in ("kind", *ROPE_FIELDS[spec.rope.kind])}
        for spec in config.layers
    ]
    return f"{_digest([identity, ropes, *([list(rounding)] if rounding else [])])}-{str(dtype).removeprefix('torch.')}"


def _canonical(value: object) -> object:
    """A number as a float: 50 and 50.0 in a config are the same arithmetic."""
    return float(value) if isinstance(value, (int, float)) else value


def _entry(tensor: StoredTensor) -> str:
    size = tensor.size_bytes
    if size <= _PLACES * _PLACE_BYTES:
        samples = tensor.read(0, size)
    else:
        starts = [(size - _PLACE_BYTES) * place // (_PLACES - 1) for place in range(_PLACES)]
        samples = b"".join(tensor.read(start, start + _PLACE_BYTES) for start in starts)
    return _digest([tensor.dtype, list(tensor.shape), samples.hex()])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
