"""Bytes and devices of any cache."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dense import DenseCache, Scores
from .ragged import RaggedCache

C = TypeVar("C", DenseCache, RaggedCache)


def nbytes(cache: DenseCache | RaggedCache) -> int:
    """Returns the bytes of allocated storage that hold pairs and metadata, reserved rows included, each once.

    Attached Scores are not counted: they are `cache.scores.values.nbytes`.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)}
    return sum(storages.values())


def to(cache: C, device: torch.device | str) -> C:
    """Returns the cache on another device; on its own device, the cache itself."""
    return _map(cache, lambda tensor: tensor.to(device))


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
