"""Moving contexts: to the host in one pinned block, back in one copy, to disk and from it."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import RaggedCache, as_ragged, save
from ..cache.caches import map_tensors, tensors_of
from ..cache.reading import open_cache, read_cache
from ..models import Model

_ALIGNMENT = 256  # bytes, as torch's own allocations


def bare(cache: RaggedCache) -> RaggedCache:
    """Returns a cache without what answering does not need: its scores."""
    return replace(cache, scores=None)


def block_bytes(cache: RaggedCache) -> int:
    """Returns the bytes that a cache takes in one block."""
    return sum(_room(x) for x in _moving(cache))


def to_host(cache: RaggedCache, stream: torch.cuda.Stream | None = None) -> RaggedCache:
    """Returns a copy on the host, in one block that a GPU reads at full speed. Waits for the copy.

    Raises: torch.OutOfMemoryError or RuntimeError where the host has no room.
    """
    block = torch.empty(block_bytes(cache), dtype=torch.uint8)
    _pin(block)
    moved = _in_block(cache, block)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(cache.device))  # which may still write the cache
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        for new, old in zip(_moving(moved), _moving(cache), strict=True):
            new.copy_(old, non_blocking=True)
    if stream is not None:
        stream.synchronize()
    return moved


def to_device(cache: RaggedCache, device: torch.device, stream: torch.cuda.Stream | None = None) -> RaggedCache:
    """Returns a copy on a device. Waits for the copy.

    What lies in one block, as `to_host` puts it, goes in one copy; anything else a tensor at a time.
    """
    block = torch.empty(block_bytes(cache), dtype=torch.uint8, device=device)  # of the memory of the current stream
    moved, source = _in_block(cache, block), _block_of(cache)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # which may still read what was there before
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        if source is None:
            for new, old in zip(_moving(moved), _moving(cache), strict=True):
                new.copy_(old, non_blocking=True)
        else:
            block.copy_(source, non_blocking=True)
    if stream is not None:
        stream.synchronize()
    return moved


def to_disk(cache: RaggedCache, path: Path) -> None:
    """Writes a cache to a file. Raises OSError if there is no room for it."""
    save(cache, path, overwrite=True)


def from_disk(path: Path, model: Model, *, pairs: bool = True) -> tuple[RaggedCache, dict[str, str]]:
    """Returns the cache of a file, on the model's device, and checksums of what the file holds.

    Args:
        pairs: False leaves keys and values in the file.

    Raises: as `load_cache` does.
    """
    with open_cache(path) as file:
        return bare(as_ragged(read_cache(file, model=model, pairs=pairs))), file.header["checksums"]


def _moving(cache: RaggedCache) -> list[Tensor]:
    """The tensors that move; token ids always stay on the host."""
    return tensors_of((cache.context, cache.tail))


def _room(x: Tensor) -> int:
    return -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT


def _in_block(cache: RaggedCache, block: Tensor) -> RaggedCache:
    """The cache with tensors that are parts of a block, one after the other, not set yet."""
    at = 0

    def part(x: Tensor) -> Tensor:
        nonlocal at
        begin, at = at, at + _room(x)
        return block[begin : begin + x.numel() * x.element_size()].view(x.dtype).view(x.shape)

    context, tail = map_tensors((cache.context, cache.tail), part)
    return replace(cache, context=context, tail=tail)


def _block_of(cache: RaggedCache) -> Tensor | None:
    """The block that all tensors of a cache are parts of, in order; None if they are not."""
    tensors, at = [x for x in _moving(cache) if x.numel()], 0
    storage = tensors[0].untyped_storage()
    for x in tensors:
        inside = x.untyped_storage().data_ptr() == storage.data_ptr() and x.is_contiguous()
        if not inside or x.data_ptr() - storage.data_ptr() != at:
            return None
        at += _room(x)
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole if len(whole) == at else None


def _pin(block: Tensor) -> None:
    """Pins a block for as long as it lives. torch's own pinned allocations are rounded up to a power of two."""
    if not torch.cuda.is_available() or not block.numel():
        return
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(block.data_ptr(), block.numel(), 0)
    if int(code) == 0:
        weakref.finalize(block.untyped_storage(), _unpin(runtime, block.data_ptr()))


def _unpin(runtime: Any, address: int) -> Callable[[], None]:
    def run() -> None:
        runtime.cudaHostUnregister(address)

    return run
