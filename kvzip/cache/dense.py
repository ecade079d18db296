"""The dense cache: every pair of every layer, as prefill leaves it; and the scores of its pairs."""

from dataclasses import dataclass, field

from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..checks import check_kind
from ..display import visible_line


@dataclass(frozen=True)
class DenseKV:
    """One global layer: keys (rotated) and values in token order, one row per token."""

    k: Float[Tensor, "1 H S D"]
    v: Float[Tensor, "1 H S D"]


@dataclass(frozen=True)
class WindowKV:
    """One sliding layer: its last tokens only, `start` the position of the first. Never scored, never pruned."""

    k: Float[Tensor, "1 H W D"]
    v: Float[Tensor, "1 H W D"]
    start: int


@dataclass(frozen=True)
class Scores:
    """How much each evictable pair matters; larger is kept first.

    values[l, h, e] belongs to the scored layer layers[l], KV head h and context token start + e; E = stop - start.
    `source` says which method gave them.
    """

    values: Float32[Tensor, "L H E"]
    layers: tuple[int, ...]
    start: int
    stop: int
    source: str

    def __repr__(self) -> str:
        where = f"{str(self.values.dtype).removeprefix('torch.')}, {self.values.device}"
        layers, heads, tokens = self.values.shape
        return f"Scores({layers} layers of {heads} heads, {tokens:,} tokens, by {visible_line(self.source)}, {where})"


@dataclass(frozen=True)
class DenseCache:
    """A prefilled context. Its first `start` tokens are the system prefix: always kept, never scored.

    `layers` is a list because `compress(consume=True)` empties it, for every cache that shares it; `layer_count` says
    how many there are in a whole cache (see `check_whole`). `chat` says whether the prefix is the chat template's, with
    the user turn still open.
    """

    layers: list[DenseKV | WindowKV]
    length: int
    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    fingerprint: str
    scores: Scores | None = None
    layer_count: int = field(default=0, repr=False)  # 0: as many as `layers` has now

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_count", self.layer_count or len(self.layers))

    def __repr__(self) -> str:
        from .memory import describe

        return describe(self)

    @property
    def kept(self) -> int:
        """Evictable pairs held: all of them."""
        return self.total

    @property
    def total(self) -> int:
        """Evictable pairs: (scored layer, head, context token)."""
        heads = sum(layer.k.shape[1] for layer in self.layers if isinstance(layer, DenseKV))
        return heads * (self.length - self.start)


def check_whole(cache: DenseCache) -> None:
    """Raises ValueError if pairs of the cache were freed by `compress(consume=True)`, TypeError for another object."""
    check_kind(cache, DenseCache)
    gone = cache.layer_count - len(cache.layers)
    if gone or not cache.layers:
        raise ValueError(
            f"expected a dense cache, got one whose pairs were freed by compress(consume=True), {gone} of "
            f"{cache.layer_count} layers are gone: prefill again, or compress without consume"
        )


def global_layers(cache: DenseCache) -> tuple[int, ...]:
    """Returns the indices of the layers without a window: those that are scored and pruned.

    Raises: ValueError if the cache was consumed.
    """
    check_whole(cache)
    return tuple(i for i, layer in enumerate(cache.layers) if isinstance(layer, DenseKV))
