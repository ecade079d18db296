"""Bytes and devices of any cache, and what to say when there are too few of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..display import visible_line
from ..ops import Quantized, decode_schedule
from .dense import DenseCache, Scores, WindowKV
from .ragged import RaggedCache, RaggedKV, check_cache, check_pairs, head_count, head_dim

C = TypeVar("C", DenseCache, RaggedCache)


def nbytes(cache: DenseCache | RaggedCache) -> int:
    """Returns the bytes of allocated storage that hold pairs and metadata, reserved rows included, each once.

    A cache loaded with `pairs=False` counts what it would take with them. The prefix, window layers, the tail and token
    ids are counted, each of which is there before and after compression; attached Scores are not: they are
    `cache.scores.values.nbytes`.

    Raises: ValueError if the cache was consumed.
    """
    check_cache(cache)
    storages = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()  # on torch's meta device all lie at 0 and none is shared
        storages[id(tensor) if tensor.is_meta else storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def full_nbytes(cache: DenseCache | RaggedCache) -> int | None:
    """Returns `nbytes` of the dense cache of this cache's context; None if rows are packed, from an unknown dtype."""
    check_cache(cache)
    layers = cache.layers if isinstance(cache, DenseCache) else cache.context
    length = cache.length if isinstance(cache, DenseCache) else cache.context_length
    size = _element_size(cache)
    if size is None:
        return None
    pairs = sum(
        2 * head_count(layer) * head_dim(layer.k) * size * (layer.k.shape[2] if isinstance(layer, WindowKV) else length)
        for layer in layers
    )
    return pairs + length * cache.token_ids.element_size()


def _element_size(cache: DenseCache | RaggedCache) -> int | None:
    """Returns the bytes of a number of the model's keys and values; None if it cannot be known.

    Rows that are packed no longer say it; window layers, the tail, or the end of the fingerprint do.
    """
    rows = [*(cache.layers if isinstance(cache, DenseCache) else cache.context)]
    plain = next((x.element_size() for row in rows if row is not None and isinstance(x := row.k, Tensor)), None)
    if plain is None and isinstance(cache, RaggedCache) and cache.tail is not None:
        plain = cache.tail.k[0].element_size()
    named = getattr(torch, cache.fingerprint.rpartition("-")[2], None)
    return named.itemsize if plain is None and isinstance(named, torch.dtype) else plain


def describe(cache: DenseCache | RaggedCache) -> str:
    """Returns what a cache is in one line, whatever state it is in: tokens, pairs kept, bytes, dtype, device."""
    name = type(cache).__name__
    layers = cache.layers if isinstance(cache, DenseCache) else cache.context
    gone = isinstance(cache, DenseCache) and len(layers) != cache.layer_count
    if gone or not layers or any(layer is None for layer in layers):
        return f"{name}({len(cache.token_ids):,} tokens, consumed)"
    tensors = _tensors(cache)
    parts = [f"{len(cache.token_ids):,} tokens", f"{cache.kept:,} of {cache.total:,} pairs"]
    if cache.total:
        parts[-1] += f" ({cache.kept / cache.total:.1%})"
    pairs = next(x for layer in layers for x in (layer.k, layer.v))
    rows = f"{pairs.bits} bits" if isinstance(pairs, Quantized) else str(pairs.dtype).removeprefix("torch.")
    device = next((str(x.device) for x in tensors if x is not cache.token_ids and not x.is_meta), "cpu")
    parts += [f"{nbytes(cache) / 1e6:,.2f} MB", rows, device]
    parts += ["keys and values left in the file"] if any(x.is_meta for x in tensors) else []
    parts += [visible_line(f"scored by {cache.scores.source}")] if cache.scores is not None else []
    return f"{name}({', '.join(parts)})"


def to(cache: C, device: torch.device | str) -> C:
    """Returns the cache on another device; on its own device, the cache itself. Token ids stay on the host.

    Raises: ValueError if the cache was consumed, or loaded with `pairs=False`.
    """
    check_pairs(cache)
    layers = cache.layers if isinstance(cache, DenseCache) else cache.context
    first = next((x for layer in layers for x in _tensors(layer)), cache.token_ids)
    if first.device == torch.empty(0, device=device).device:
        return cache
    moved = _map(cache, lambda tensor: tensor.to(device))
    changes: dict[str, Any] = {"token_ids": cache.token_ids}
    if isinstance(cache, RaggedCache):  # heads are cut for the processors of a device
        cut = [replace(x, schedule=decode_schedule(x.offsets)) if isinstance(x, RaggedKV) else x for x in moved.context]
        changes["context"] = tuple(cut)
    return replace(moved, **changes)


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that can still be allocated on a device, None where that cannot be known.

    On a GPU the free ones and those that torch holds and does not use; on the host what Linux calls available.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if device.type == "cpu" and available else None


@contextmanager
def explain_out_of_memory(needed: str, remedy: str) -> Iterator[None]:
    """Raises torch.OutOfMemoryError with `needed` (bytes, and for what) and `remedy` where memory runs out within."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"expected room for {needed}, got out of memory: {remedy}") from error


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, lambda tensor: found.append(tensor) or tensor, skip=Scores)
    return found


def _map(value: Any, change: Callable[[Tensor], Tensor], skip: type | None = None) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change, skip) for item in value)
    if is_dataclass(value) and not isinstance(value, type) and not (skip and isinstance(value, skip)):
        return replace(value, **{f.name: _map(getattr(value, f.name), change, skip) for f in fields(value)})
    return value
