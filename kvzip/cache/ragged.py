"""The ragged cache: a frozen context whose heads differ in length, and the dense tail that follows it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from ..checks import check_kind
from ..ops import DecodeSchedule, Quantized, decode_schedule
from .dense import DenseCache, DenseKV, Scores, WindowKV, check_whole


@dataclass(frozen=True)
class RaggedKV:
    """One pruned layer. Head h owns rows offsets[h]:offsets[h+1], oldest first; keys are already rotated.

    positions[n] is the token that row n came from. `schedule` cuts the heads into equal pieces for the GPU.
    """

    k: Float[Tensor, "N D"] | Quantized
    v: Float[Tensor, "N D"] | Quantized
    offsets: Int32[Tensor, " H1"]  # H + 1
    positions: Int32[Tensor, " N"]
    schedule: DecodeSchedule


@dataclass(frozen=True)
class Tail:
    """Tokens after a frozen context, per layer [B H R D] with R rows reserved for each of B questions.

    lengths[b] rows of question b are set. Rows at and beyond that are unset memory.
    """

    k: tuple[Float[Tensor, "B H R D"], ...]
    v: tuple[Float[Tensor, "B H R D"], ...]
    lengths: Int32[Tensor, " B"]


@dataclass(frozen=True)
class RaggedCache:
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

    def __repr__(self) -> str:
        from .memory import describe

        return describe(self)


def check_cache(cache: DenseCache | RaggedCache) -> None:
    """Raises TypeError unless it is a cache of either kind, ValueError if `compress(consume=True)` freed its pairs."""
    check_kind(cache, DenseCache, RaggedCache)
    if isinstance(cache, DenseCache):
        check_whole(cache)


def check_pairs(cache: DenseCache | RaggedCache) -> None:
    """Raises as `check_cache` does, and ValueError if keys and values were left in the file."""
    check_cache(cache)
    layers = cache.layers if isinstance(cache, DenseCache) else cache.context
    rows = layers[0].k
    if (rows if isinstance(rows, Tensor) else rows.codes).is_meta:
        raise ValueError(
            "expected a cache with its pairs, got one loaded with pairs=False: its keys and values are in the file, "
            "load it without pairs=False"
        )


def as_ragged(cache: DenseCache) -> RaggedCache:
    """Returns the dense cache seen as a ragged one with all heads full. No pair is copied.

    Raises: ValueError if the cache was consumed.
    """
    check_whole(cache)
    dense = [layer for layer in cache.layers if isinstance(layer, DenseKV)]
    views = iter(full_heads(dense, start=0))
    return RaggedCache(
        context=tuple(next(views) if isinstance(layer, DenseKV) else layer for layer in cache.layers),
        tail=None,
        context_length=cache.length,
        start=cache.start,
        chat=cache.chat,
        token_ids=cache.token_ids,
        fingerprint=cache.fingerprint,
        kept=cache.kept,
        total=cache.total,
        scores=cache.scores,
    )


def full_heads(layers: Sequence[DenseKV] | Sequence[WindowKV], *, start: int) -> list[RaggedKV]:
    """Returns layers of equal shape, whose first row is token `start`, seen as ragged ones. No pair is copied."""
    if not layers:
        return []
    heads, rows = layers[0].k.shape[1:3]
    device = layers[0].k.device
    bounds = [rows * head for head in range(heads + 1)]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    positions = torch.arange(start, start + rows, dtype=torch.int32, device=device).repeat(heads)
    schedule = decode_schedule(offsets, bounds=bounds)
    flat = [[rearrange(x, "1 h s d -> (h s) d") for x in (layer.k, layer.v)] for layer in layers]
    return [RaggedKV(k, v, offsets, positions, schedule) for k, v in flat]


def all_ragged(context: Sequence[RaggedKV | WindowKV]) -> tuple[RaggedKV, ...]:
    """Returns a context with its window layers seen as ragged ones, as decoding reads them."""
    windows = [layer for layer in context if isinstance(layer, WindowKV)]
    views = iter(full_heads(windows, start=windows[0].start if windows else 0))
    return tuple(next(views) if isinstance(layer, WindowKV) else layer for layer in context)


def empty_tail(context: Sequence[RaggedKV | WindowKV], batch: int, rows: int, *, dtype: torch.dtype) -> Tail:
    """Returns a tail of length 0 with `rows` rows reserved for each of `batch` questions."""
    device = context[0].k.device if isinstance(context[0].k, Tensor) else context[0].k.codes.device
    shapes = [(batch, head_count(layer), rows, head_dim(layer.k)) for layer in context]
    k, v = (tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes) for _ in range(2))
    return Tail(k=k, v=v, lengths=torch.zeros(batch, dtype=torch.int32, device=device))


def grow_tail(tail: Tail, batch: int, rows: int) -> Tail:
    """Returns a copy of a one-question tail, repeated for `batch` questions, with `rows` further rows reserved."""

    def grow(x: Tensor) -> Tensor:
        new = x.new_empty(batch, x.shape[1], x.shape[2] + rows, x.shape[3])
        new[:, :, : x.shape[2]] = x
        return new

    return Tail(k=tuple(map(grow, tail.k)), v=tuple(map(grow, tail.v)), lengths=tail.lengths.expand(batch).clone())


def head_count(layer: DenseKV | WindowKV | RaggedKV) -> int:
    """Returns the number of KV heads of a layer."""
    return len(layer.offsets) - 1 if isinstance(layer, RaggedKV) else layer.k.shape[1]


def head_dim(x: Tensor | Quantized) -> int:
    """Returns the width of the rows of keys or values."""
    return x.shape[-1] if isinstance(x, Tensor) else x.codes.shape[-1] * 8 // x.bits
