"""The data that ops take and give, the owners of ragged rows, and numbers that a reference and its kernel share."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8
from torch import Tensor

TailTensors = tuple[Float[Tensor, "B H R D"], Float[Tensor, "B H R D"], Int32[Tensor, " B"]]
"""Keys, values and lengths of the new tokens of one layer."""

Packed = tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], Int32[Tensor, " H1"], Int32[Tensor, " N"]]
"""Kept keys and values, their heads' offsets (H + 1) and their positions."""

Scores = Float32[Tensor, "L H E"] | list[Float32[Tensor, "_ _"]] | tuple[Float32[Tensor, "_ _"], ...]
Mask = Bool[Tensor, "L H E"] | list[Bool[Tensor, "_ _"]]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm of the input; see `rms_norm`."""

    weight: Float[Tensor, " K"]
    eps: float
    offset: int = 0


@dataclass(frozen=True)
class Channels:
    """Center and spread of the D channels of each of H heads: x = center[h] + spread[h] * rest.

    Channels of keys differ by orders of magnitude, and a few are far from 0 in every row: without this those few would
    set the scale of the whole row, which in 4 bits has 16 steps. Spreads of rows that are not turned are powers of two:
    their products are exact.
    """

    center: Float32[Tensor, "H D"]
    spread: Float32[Tensor, "H D"]


@dataclass(frozen=True)
class Quantized:
    """N rows of D values: value[n, d] = zero[n, d // group] + scale[n, d // group] * code[n, d].

    With 8 bits byte d is code d, with 4 bits byte i holds codes 2i and 2i + 1, and with 2 bits codes 4i to 4i + 3, the
    first in its highest bits. With `turned` this row is `turn` of what is meant, and with `channels` that is the rest
    of the values: see `Channels`.
    """

    codes: UInt8[Tensor, "N P"]  # P = D * bits / 8
    scale: Float[Tensor, "N Q"]  # Q = D / group; float16 or float32
    zero: Float[Tensor, "N Q"]
    bits: int
    group: int
    channels: Channels | None = None
    turned: bool = False

    @property
    def width(self) -> int:
        """Values of a row, D."""
        return self.codes.shape[1] * 8 // self.bits


@dataclass(frozen=True)
class Splits:
    """Ragged heads cut into splits of nearly equal length, in whole tiles except at the end of a head.

    bounds: (head, first row, row after the last) of each split, head after head.
    first: splits first[h]:first[h + 1] belong to head h.
    """

    bounds: Int32[Tensor, "P 3"]
    first: Int32[Tensor, " H1"]


@dataclass(frozen=True)
class DecodeSchedule:
    """Several ways to cut the same heads, the shortest splits first.

    A few query rows need many short splits to fill the device; many rows fill it with a few long ones, and every
    split costs a partial result per row. Which cut is taken depends on shapes only, never on values.
    """

    cuts: tuple[Splits, ...]  # at most eight splits per SM, four, two, one, a half, ..., whole heads
    sms: int


@dataclass(frozen=True)
class Context:
    """One layer of a frozen context: head h owns rows offsets[h]:offsets[h + 1] of keys, values and biases."""

    k: Float[Tensor, "N D"] | Quantized
    v: Float[Tensor, "N D"] | Quantized
    offsets: Int32[Tensor, " H1"]
    bias: Float[Tensor, " N"] | None = None

    @property
    def width(self) -> int:
        """Values of a row, D."""
        return self.k.shape[1] if isinstance(self.k, Tensor) else self.k.width


@dataclass(frozen=True)
class ContextTable:
    """Up to C contexts of L layers for `decode_rows`; see `context_table`. Contexts stay where they are in memory.

    layers[c] are the layers of context c, or None where there is none. The device finds them by `addresses` (of keys,
    values, their steps and zeros, centers, spreads, biases, offsets) and their lengths by `offsets`.
    """

    layers: list[tuple[Context, ...] | None]
    addresses: Int64[Tensor, "L C 10"]
    offsets: Int32[Tensor, "L C H1"]
    formats: tuple[Context, ...]  # one without rows for each layer: dtypes, bits and groups that all contexts have


@dataclass(frozen=True)
class QueryRows:
    """What each of N query rows of a batch is: a token of a sequence (a question or an answer) that reads a context.

    Rows of one sequence are consecutive, oldest first. Rows of one context may lie anywhere.
    """

    context: Int32[Tensor, " N"]  # a place in the table; -1, or whatever is none of its places: no context
    sequence: Int32[Tensor, " N"]  # whose tail it sees
    length: Int32[Tensor, " N"]  # rows of the tail that it sees, its own included; 0: none


@dataclass(frozen=True)
class Pages:
    """Tails of S sequences in one layer: row j of sequence s is row j % R of page table[s, j // R]."""

    k: Float[Tensor, "P H R D"]
    v: Float[Tensor, "P H R D"]
    table: Int32[Tensor, "S X"]


def divided(x: Tensor, number: int | float) -> Tensor:
    """x / number, rounded alike on every device: on a GPU torch multiplies by the reciprocal of a plain number."""
    return x / torch.full_like(x, number)


def group_of(width: int) -> int:
    """Returns how many values of a row share a scale by default: 128, or all of them where that leaves a rest."""
    return width if width % 128 else 128


def owners(offsets: Int32[Tensor, " H1"], rows: int) -> Int64[Tensor, " N"]:
    """Returns the head that owns each of `rows` rows. The host does not wait for the device."""
    return torch.searchsorted(offsets[1:], torch.arange(rows, dtype=offsets.dtype, device=offsets.device), right=True)


# Of `quantize`, whose reference and kernel give the same bits:
LARGEST = torch.finfo(torch.float32).max
LEAST = 2.0**-149  # the smallest number above 0 in float32
SMALL = 2.0**-110  # a group's span below which rounding may change its scale by more than an ulp
DEEP = -(2.0**64)  # while a group's least value is above this, its span is within float32
NOT_FINITE = "expected finite values, got inf or NaN: they have no scale; check the forward pass that made them"
# Of `quantize_turned`:
LIMIT = 2.0**115  # turned values of what is clipped to this are far within float32
FINE = 2.0**-14  # below this no error of a key's rest counts, whose mean square is 1
NARROW = 0.8  # part of the range of values in 2 bits that is rounded to
SHAPED = 8  # values that are rounded at once with feedback
