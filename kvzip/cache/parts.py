"""What caches are made of: the pairs of one layer in each of their forms, the tail, and the scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from ..display import visible_line
from ..ops import DecodeSchedule, Quantized, decode_schedule


class Layer:
    """What every form of a layer has: a row of k and v for each token or, ragged, for each kept pair."""

    k: Any
    v: Any

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return self.k.shape[1]

    @property
    def width(self) -> int:
        """The head width, D."""
        return self.k.shape[-1] if isinstance(self.k, Tensor) else self.k.width

    @property
    def device(self) -> torch.device:
        """Where the layer is; the meta device if its keys and values were left in a file."""
        return self.k.device if isinstance(self.k, Tensor) else self.k.codes.device


@dataclass(frozen=True)
class DenseKV(Layer):
    """One global layer: keys (rotated) and values in token order, one row per token."""

    k: Float[Tensor, "1 H S D"]
    v: Float[Tensor, "1 H S D"]


@dataclass(frozen=True)
class WindowKV(Layer):
    """One sliding-window layer: its last tokens only, `start` the position of the first. Never scored, never pruned."""

    k: Float[Tensor, "1 H W D"]
    v: Float[Tensor, "1 H W D"]
    start: int


@dataclass(frozen=True)
class RaggedKV(Layer):
    """One pruned layer. Head h owns rows offsets[h]:offsets[h+1], oldest first; keys are already rotated.

    positions[n] is the token that row n came from. `schedule` says how decoding splits the heads on a GPU. bias[n] is
    added to the logit of row n, after scale and softcap: a row of bias b counts like exp(b) rows of its key. None is 0.
    """

    k: Float[Tensor, "N D"] | Quantized
    v: Float[Tensor, "N D"] | Quantized
    offsets: Int32[Tensor, " H1"]  # H + 1
    positions: Int32[Tensor, " N"]
    schedule: DecodeSchedule
    bias: Float[Tensor, " N"] | None = None  # float16 or float32

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Tail:
    """Tokens after a frozen context, per layer [B H R D] with R rows reserved for each of B questions.

    The first lengths[b] rows of question b are set; the rows after them are uninitialized memory.
    """

    k: tuple[Float[Tensor, "B H R D"], ...]
    v: tuple[Float[Tensor, "B H R D"], ...]
    lengths: Int32[Tensor, " B"]


@dataclass(frozen=True)
class Scores:
    """How much each evictable pair matters; larger is kept first.

    values[l, h, e] belongs to the scored layer layers[l], KV head h and context token start + e; E = stop - start.
    `source` says which method gave them. asked[l, h] is the sum of q q^T over queries that scoring asked with, of heads
    that are here: keys in few bits are rounded by it. It is of use with all pairs only, so compressed caches and files
    have none.
    """

    values: Float32[Tensor, "L H E"]
    layers: tuple[int, ...]
    start: int
    stop: int
    source: str
    asked: Float32[Tensor, "L h D D"] | None = None

    def __repr__(self) -> str:
        where = f"{str(self.values.dtype).removeprefix('torch.')}, {self.values.device}"
        layers, heads, tokens = self.values.shape
        return f"Scores({layers} layers of {heads} heads, {tokens:,} tokens, by {visible_line(self.source)}, {where})"


def full_heads(layers: Sequence[Layer], kind: type[DenseKV] | type[WindowKV]) -> tuple[Any, ...]:
    """Returns layers, those of one kind (of one shape) as ragged layers that keep every row. No pair is copied."""
    whole = [layer for layer in layers if isinstance(layer, kind)]
    if not whole:
        return tuple(layers)
    heads, rows = whole[0].k.shape[1:3]
    first = whole[0].start if isinstance(whole[0], WindowKV) else 0
    bounds = [rows * head for head in range(heads + 1)]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=whole[0].device)
    positions = torch.arange(first, first + rows, dtype=torch.int32, device=whole[0].device).repeat(heads)
    schedule = decode_schedule(offsets, bounds=bounds)

    def seen(layer: Layer) -> RaggedKV:
        k, v = (rearrange(x, "1 h s d -> (h s) d") for x in (layer.k, layer.v))
        return RaggedKV(k, v, offsets, positions, schedule)

    return tuple(seen(layer) if isinstance(layer, kind) else layer for layer in layers)


def all_ragged(context: Sequence[RaggedKV | WindowKV]) -> tuple[RaggedKV, ...]:
    """Returns a context with its window layers as ragged ones, the form that decoding reads."""
    return full_heads(context, WindowKV)


def empty_tail(context: Sequence[RaggedKV | WindowKV], batch: int, rows: int, *, dtype: torch.dtype) -> Tail:
    """Returns a tail of length 0 with `rows` rows reserved for each of `batch` questions."""
    device = context[0].device
    shapes = [(batch, layer.heads, rows, layer.width) for layer in context]
    k, v = (tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes) for _ in range(2))
    return Tail(k=k, v=v, lengths=torch.zeros(batch, dtype=torch.int32, device=device))


def grow_tail(tail: Tail, batch: int, rows: int) -> Tail:
    """Returns a copy of a one-question tail, repeated for `batch` questions, with `rows` further rows reserved."""

    def grow(x: Tensor) -> Tensor:
        new = x.new_empty(batch, x.shape[1], x.shape[2] + rows, x.shape[3])
        new[:, :, : x.shape[2]] = x
        return new

    return Tail(k=tuple(map(grow, tail.k)), v=tuple(map(grow, tail.v)), lengths=tail.lengths.expand(batch).clone())
