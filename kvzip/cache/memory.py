"""Bytes and devices of any cache, and what to say when there are too few of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import check_kind
from ..ops import decode_schedule
from .dense import DenseCache, Scores
from .ragged import RaggedCache, RaggedKV

C = TypeVar("C", DenseCache, RaggedCache)


def nbytes(cache: DenseCache | RaggedCache) -> int:
    """Returns the bytes of allocated storage that hold pairs and metadata, reserved rows included, each once.

    Attached Scores are not counted: they are `cache.scores.values.nbytes`.
    """
    check_kind(cache, DenseCache, RaggedCache)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)}
    return sum(storages.values())


def to(cache: C, device: torch.device | str) -> C:
    """Returns the cache on another device; on its own device, the cache itself. Token ids stay on the host."""
    check_kind(cache, DenseCache, RaggedCache)
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
