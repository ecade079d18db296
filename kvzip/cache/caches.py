"""The two caches: dense, as prefill returns it, and ragged, a frozen context and its tail."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ..checks import check_kind
from ..display import shown_bits, visible_line
from ..ops import Quantized
from ..parallel import Share
from .parts import DenseKV, RaggedKV, Scores, Tail, WindowKV, empty_tail, full_heads, grow_tail

REFITTED = "+refit"
"""In the method of a cache, after the level: rows have biases and new values, see `kvzip.refit`."""


class Cache:
    """The fields that both kinds of cache share. `context` has one entry for each layer.

    The first `start` tokens are the system prefix: always kept, never scored. `kept` and `total` count evictable pairs,
    those of the scored layers, all heads and the context's tokens. `method` says how pairs were chosen, "" if all are
    kept. `chat` says whether the prefix is the chat template's, with the user turn still open. Where ranks share the
    model, `share` says which heads this one has; scores, `kept` and `total` are of all heads on every rank.
    """

    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    fingerprint: str
    scores: Scores | None
    share: Share | None
    context: Any
    context_length: Any
    tail: Any
    kept: Any
    total: Any
    method: Any

    def __repr__(self) -> str:
        assert isinstance(self, (DenseCache, RaggedCache))
        name, layers = type(self).__name__, self.layers if isinstance(self, DenseCache) else self.context
        if not layers or any(layer is None for layer in layers):  # freed, or about to be
            return f"{name}({len(self.token_ids):,} tokens, consumed)"
        tensors, k, scores = tensors_of(self), layers[0].k, self.scores
        share = f" ({self.kept / self.total:.1%})" if self.total else ""
        packed = [x.bits for x in (k, layers[0].v) if isinstance(x, Quantized)]
        rows = str(k.dtype).removeprefix("torch.") if isinstance(k, Tensor) else shown_bits(packed)
        device = next((x.device for x in tensors if x is not self.token_ids and not x.is_meta), "cpu")
        parts = [f"{len(self.token_ids):,} tokens", f"{self.kept:,} of {self.total:,} pairs{share}"]
        parts += [f"{nbytes(self) / 1e6:,.2f} MB", rows, str(device)]
        parts += ["keys and values left in the file"] if any(x.is_meta for x in tensors) else []
        parts += [visible_line(f"scored by {scores.source}")] if scores is not None else []
        return f"{name}({', '.join(parts)})"

    @property
    def scored_layers(self) -> tuple[int, ...]:
        """The indices of the layers without a window: those that are scored and pruned."""
        return tuple(n for n, layer in enumerate(self.context) if not isinstance(layer, WindowKV))

    @property
    def heads(self) -> int:
        """KV heads of each layer, of those that are here."""
        return self.context[0].heads

    @property
    def all_heads(self) -> int:
        """KV heads of each layer, those of other ranks too."""
        return self.heads if self.share is None else self.share.heads

    @property
    def device(self) -> torch.device:
        """Where scores, offsets and, unless they were left in a file, the pairs are."""
        first = self.context[0]
        return first.offsets.device if isinstance(first, RaggedKV) else first.device


@dataclass(frozen=True, repr=False)
class DenseCache(Cache):
    """A prefilled context with all of its pairs.

    `layers` is a list because `compress(consume=True)` empties it, for every cache that shares it; `layer_count` says
    how many there are in a whole cache (see `check_whole`).
    """

    layers: list[DenseKV | WindowKV]
    length: int
    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    fingerprint: str
    scores: Scores | None = None
    share: Share | None = None
    layer_count: int = 0  # 0: as many as `layers` has now

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_count", self.layer_count or len(self.layers))

    @property
    def context(self) -> tuple[DenseKV | WindowKV, ...]:
        """The layers."""
        return tuple(self.layers)

    @property
    def context_length(self) -> int:
        """Tokens of prefix and context."""
        return self.length

    @property
    def tail(self) -> None:
        """Always None: nothing follows the context."""
        return None

    @property
    def kept(self) -> int:
        """Evictable pairs held: all of them."""
        return self.total

    @property
    def total(self) -> int:
        """Evictable pairs: (scored layer, head, context token)."""
        heads = sum(self.all_heads for layer in self.layers if isinstance(layer, DenseKV))
        return heads * (self.length - self.start)

    @property
    def method(self) -> str:
        """How pairs will be chosen: the source of the scores, if there are any."""
        return self.scores.source if self.scores is not None else ""


@dataclass(frozen=True, repr=False)
class RaggedCache(Cache):
    """A compressed context, shared by any number of questions.

    `kept` and `total` count evictable pairs; the first `start` tokens (system prefix) and window layers are not
    counted and stay. `context_length` is the position where the tail starts; `token_ids` includes the tail's. `method`
    says how pairs were chosen, "kvzip-chunk/pair" for the source of the scores and the level; empty: all are kept.
    """

    context: tuple[RaggedKV | WindowKV, ...]
    tail: Tail | None
    context_length: int
    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    fingerprint: str
    kept: int
    total: int
    scores: Scores | None = None
    method: str = ""
    share: Share | None = None


def check_whole(cache: DenseCache) -> None:
    """Raises ValueError if pairs of the cache were freed by `compress(consume=True)`, TypeError for another object."""
    check_kind(cache, DenseCache)
    gone = cache.layer_count - len(cache.layers)
    if gone or not cache.layers:
        raise ValueError(
            f"expected a dense cache, got one whose pairs were freed by compress(consume=True), {gone} of "
            f"{cache.layer_count} layers are gone: prefill again, or compress without consume"
        )


def check_cache(cache: DenseCache | RaggedCache) -> None:
    """Raises TypeError unless it is a cache of either kind, ValueError if `compress(consume=True)` freed its pairs."""
    check_kind(cache, DenseCache, RaggedCache)
    if isinstance(cache, DenseCache):
        check_whole(cache)


def check_pairs(cache: DenseCache | RaggedCache) -> None:
    """Raises as `check_cache` does, and ValueError if keys and values were left in the file."""
    check_cache(cache)
    if cache.context[0].device.type == "meta":
        raise ValueError(
            "expected a cache with its pairs, got one loaded with pairs=False: its keys and values are in the file, "
            "load it without pairs=False"
        )


def global_layers(cache: DenseCache) -> tuple[int, ...]:
    """Returns the indices of the layers without a window: those that are scored and pruned.

    Raises: ValueError if the cache was consumed.
    """
    check_whole(cache)
    return cache.scored_layers


def as_ragged(cache: DenseCache | RaggedCache) -> RaggedCache:
    """Returns a dense cache as a ragged one that keeps every row, a ragged one as it is. No pair is copied.

    Raises: ValueError if the cache was consumed.
    """
    check_cache(cache)
    if isinstance(cache, RaggedCache):
        return cache
    return ragged_of(cache, full_heads(cache.context, DenseKV), kept=cache.kept, total=cache.total, method="")


def ragged_of(
    cache: DenseCache | RaggedCache, context: tuple[RaggedKV | WindowKV, ...], *, kept: int, total: int, method: str
) -> RaggedCache:
    """Returns a ragged cache of these layers, without a tail; its other fields are those of `cache`."""
    shared = ("context_length", "start", "chat", "token_ids", "fingerprint", "scores", "share")
    own: dict[str, Any] = {name: getattr(cache, name) for name in shared}
    return RaggedCache(context=context, tail=None, kept=kept, total=total, method=method, **own)


def roomy_tail(cache: RaggedCache, batch: int, rows: int, *, dtype: torch.dtype) -> Tail:
    """Returns a copy of the cache's tail for each of `batch` questions, with `rows` further rows reserved."""
    if cache.tail is None:
        return empty_tail(cache.context, batch, rows, dtype=dtype)
    return grow_tail(cache.tail, batch, rows)


def nbytes(cache: DenseCache | RaggedCache) -> int:
    """Returns the bytes of allocated storage that hold pairs and metadata, reserved rows included, each once.

    A cache loaded with `pairs=False` counts as if it had them. The prefix, window layers, the tail and token ids, which
    remain after compression, are counted; attached Scores (`cache.scores.values.nbytes`) are not.

    Raises: ValueError if the cache was consumed.
    """
    check_cache(cache)
    storages = {}
    for tensor in tensors_of(cache):
        storage = tensor.untyped_storage()  # meta tensors all have address 0 and share nothing
        storages[id(tensor) if tensor.is_meta else storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_of(value: Any) -> list[Tensor]:
    """Returns the tensors in a cache or a part of one, attached scores left out."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor, skip=Scores)
    return found


def map_tensors(value: Any, change: Callable[[Tensor], Tensor], skip: type | None = None) -> Any:
    """Returns a cache, or a part of one, with `change` applied to each tensor, except within a `skip`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change, skip) for item in value)
    if is_dataclass(value) and not isinstance(value, type) and not (skip and isinstance(value, skip)):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), change, skip) for f in fields(value)})
    return value
