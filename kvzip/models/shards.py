"""Safetensors files: their tensors, one file open at a time, and errors that name a damaged one."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .identity import StoredTensor

_MAPPED = 256 << 20  # bytes of a file in memory, beside what is being read
_BLOCK = 64 << 20  # bytes copied at once


@dataclass(frozen=True)
class Place:
    """A tensor in a file, its type as safetensors spells it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def same(embed: Place, head: Place, dtype: torch.dtype, rows: int = 4096) -> bool:
    """Whether two matrices of one shape are equal in `dtype`, read some rows at a time."""
    with opened(embed.path) as one, opened(head.path) as other:
        a, b = one.get_slice(embed.name), other.get_slice(head.name)
        steps = range(0, a.get_shape()[0], rows)
        return all(torch.equal(a[i : i + rows].to(dtype), b[i : i + rows].to(dtype)) for i in steps)


Read = Callable[..., Tensor]
"""read(place, index): a tensor of a file, or the part of it at an index of slices, mapped and not copied."""


@contextmanager
def shards() -> Iterator[Read]:
    """Within it, tensors can be read of any file.

    One file is open at a time, and is opened again after some reading, so that what was mapped of it leaves memory.
    """
    with ExitStack() as stack:
        held: dict[Path, Any] = {}
        mapped = 0

        def read(place: Place, index: tuple[slice, ...] = ()) -> Tensor:
            nonlocal mapped
            if place.path not in held or mapped > _MAPPED:
                held.clear()
                stack.close()
                held[place.path], mapped = stack.enter_context(opened(place.path)), 0
            shard = held[place.path]
            found = shard.get_slice(place.name)[index] if index else shard.get_tensor(place.name)
            rows = found.stride(0) * found.shape[0] if found.ndim else 1
            mapped += rows * found.element_size()  # whole rows: their pages are read
            return found

        yield read


def copy_(target: Tensor, read: Read, place: Place, index: tuple[slice, ...] = ()) -> None:
    """Fills a tensor with a stored one or a part of it, some rows at a time."""
    if not target.numel():
        return
    rows = index[0].indices(1 << 62)[0] if index else 0
    step = max(1, _BLOCK // (target[0].nbytes or 1))
    for at in range(0, len(target), step):
        part = target[at : at + step]
        part.copy_(read(place, (slice(rows + at, rows + at + len(part)), *index[1:])))


def stored(places: Mapping[str, Place]) -> Iterator[StoredTensor]:
    """Yields tensors as they are stored, by the names given, whose bytes are read of their files on demand."""
    files: dict[Path, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        files.setdefault(place.path, []).append((name, place))
    for path, inside in files.items():
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for name, place in inside:
                entry = header[place.name]
                first, end = (8 + size + at for at in entry["data_offsets"])
                yield StoredTensor(
                    name, entry["dtype"], tuple(entry["shape"]), end - first, partial(_bytes, file, first)
                )


def _bytes(file: BinaryIO, first: int, start: int, stop: int) -> bytes:
    file.seek(first + start)
    return file.read(stop - start)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a file. Raises ValueError that names it if it is damaged, also while it is read."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(
            f"expected a whole safetensors file, got {path.name} of {path.stat().st_size} bytes ({error}): "
            "it is truncated or damaged, fetch it again"
        ) from error
