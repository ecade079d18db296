"""Safetensors files: their tensors, one file open at a time, and errors that name a damaged one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A tensor in a file, its type as safetensors spells it."""

    path: Path
    name: str
    dtype: str


def same(embed: Place, head: Place, dtype: torch.dtype, rows: int = 4096) -> bool:
    """Whether two matrices of one shape are equal in `dtype`, read some rows at a time."""
    with opened(embed.path) as one, opened(head.path) as other:
        a, b = one.get_slice(embed.name), other.get_slice(head.name)
        steps = range(0, a.get_shape()[0], rows)
        return all(torch.equal(a[i : i + rows].to(dtype), b[i : i + rows].to(dtype)) for i in steps)


@contextmanager
def shards() -> Iterator[Callable[[Place], Tensor]]:
    """Within it, tensors can be read of any file; one file is open at a time."""
    with ExitStack() as stack:
        held: dict[Path, Any] = {}

        def tensor_of(place: Place) -> Tensor:
            if place.path not in held:
                held.clear()
                stack.close()
                held[place.path] = stack.enter_context(opened(place.path))
            return held[place.path].get_tensor(place.name)

        yield tensor_of


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
