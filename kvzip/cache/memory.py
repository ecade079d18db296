"""Moving a cache between devices, its uncompressed size, free memory, and the error when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..files.schema import dtype_of
from ..ops import decode_schedule
from .caches import DenseCache, RaggedCache, check_cache, check_pairs, map_tensors, tensors_of
from .parts import RaggedKV, WindowKV

C = TypeVar("C", DenseCache, RaggedCache)


def full_nbytes(cache: DenseCache | RaggedCache) -> int | None:
    """Returns `nbytes` of the dense cache of this cache's context; None if the model's dtype is not known.

    The dtype is that of layers that are not quantized, or of the tail; without any, the fingerprint ends in it.
    """
    check_cache(cache)
    length, tail = cache.context_length, () if cache.tail is None else cache.tail.k
    plain = [x.dtype for x in (*(layer.k for layer in cache.context), *tail) if isinstance(x, Tensor)]
    dtype = plain[0] if plain else getattr(torch, dtype_of(cache.fingerprint) or "", None)
    if dtype is None:
        return None
    rows = [x.heads * x.width * (x.k.shape[2] if isinstance(x, WindowKV) else length) for x in cache.context]
    return 2 * dtype.itemsize * sum(rows) + length * cache.token_ids.element_size()


def to(cache: C, device: torch.device | str) -> C:
    """Returns the cache on another device; on its own device, the cache itself. Token ids stay on the host.

    Raises: ValueError if the cache was consumed, or loaded with `pairs=False`.
    """
    check_pairs(cache)
    if tensors_of(cache.context)[0].device == torch.empty(0, device=device).device:
        return cache
    moved = map_tensors(cache, lambda tensor: tensor.to(device))
    if isinstance(cache, RaggedCache):  # a schedule is for the SMs of one device
        own = [replace(x, schedule=decode_schedule(x.offsets)) if isinstance(x, RaggedKV) else x for x in moved.context]
        moved = replace(moved, context=tuple(own))
    return replace(moved, token_ids=cache.token_ids)


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that can still be allocated on a device, None where that cannot be known.

    On a GPU free memory and the unused part of torch's allocator; on the host MemAvailable of Linux.
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
