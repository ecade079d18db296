"""Where a cache is, what its context would take uncompressed, and what to say when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops import decode_schedule
from .caches import DenseCache, RaggedCache, check_cache, check_pairs, map_tensors, tensors_of
from .parts import RaggedKV, WindowKV

C = TypeVar("C", DenseCache, RaggedCache)


def full_nbytes(cache: DenseCache | RaggedCache) -> int | None:
    """Returns `nbytes` of the dense cache of this cache's context; None if rows are packed, from an unknown dtype."""
    check_cache(cache)
    size, length = _element_size(cache), cache.context_length
    if size is None:
        return None
    rows = [x.k.shape[2] if isinstance(x, WindowKV) else length for x in cache.context]
    pairs = sum(2 * x.heads * x.width * size * n for x, n in zip(cache.context, rows, strict=True))
    return pairs + length * cache.token_ids.element_size()


def _element_size(cache: DenseCache | RaggedCache) -> int | None:
    """Returns the bytes of a number of the model's keys and values; None if it cannot be known.

    Rows that are packed no longer say it; window layers, the tail, or the end of the fingerprint do.
    """
    rows = [x.k for x in cache.context] + ([] if cache.tail is None else [cache.tail.k[0]])
    plain = next((x.element_size() for x in rows if isinstance(x, Tensor)), None)
    named = getattr(torch, cache.fingerprint.rpartition("-")[2], None)
    return named.itemsize if plain is None and isinstance(named, torch.dtype) else plain


def to(cache: C, device: torch.device | str) -> C:
    """Returns the cache on another device; on its own device, the cache itself. Token ids stay on the host.

    Raises: ValueError if the cache was consumed, or loaded with `pairs=False`.
    """
    check_pairs(cache)
    first = next(iter(tensors_of(cache.context)))
    if first.device == torch.empty(0, device=device).device:
        return cache
    moved = map_tensors(cache, lambda tensor: tensor.to(device))
    changes: dict[str, Any] = {"token_ids": cache.token_ids}
    if isinstance(cache, RaggedCache):  # a schedule is for the SMs of one device
        changes["context"] = tuple(
            replace(x, schedule=decode_schedule(x.offsets)) if isinstance(x, RaggedKV) else x for x in moved.context
        )
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
