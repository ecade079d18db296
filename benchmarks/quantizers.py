"""Quantizers that are only simulated: rows are rounded and restored in plain PyTorch, and their bytes are counted.

A `Way` says what is done to the rows of a head before they are rounded, and which of them share a step and a zero. What
it would store is counted by `stored_bytes`: codes without padding but to whole bytes of a row, and 16-bit numbers, but
for centers and spreads, which `ops.quantize` has in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from kvzip import DenseCache, Model
from kvzip.attention import repeat_attend
from kvzip.models import Attend
from kvzip.ops.quantize import measure_channels
from kvzip.ops.types import owners
from kvzip.scoring import repeats, run_repeats

BLOCK = 128
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_ROUNDS = 16  # of balancing rows and channels


@dataclass(frozen=True)
class Way:
    """How the rows of one tensor are quantized, in this order.

    center, spread: each head's channels are moved to the mean 0, and divided by powers of two.
    root: channels are divided by the square roots of their deviations, so that errors end up in between of equal and
        in proportion to the channel.
    first: the center moves by what the first row loses, so that this row comes back as it was.
    rotate: rows are multiplied by an orthonormal Hadamard matrix.
    balance: in each block of 128 rows of a head, rows and channels are divided by scales that make the standard
        deviations of all rows, and of all channels, equal (KVarN, arXiv 2606.03458).
    channels: the rows of a block share a step and a zero in each channel; else the values of a row do.
    asked: keys are brought to axes where errors cost about the same, by a head's second moments C of its rows and Q of
        the queries that ask them. "scale" divides channels by (C / Q)^(1/4), "matrix" multiplies rows by M^(1/2), M the
        geometric mean of Q and the inverse of C, so that the sum of squared errors of logits is least where all axes
        are rounded alike; "white" by C^(-1/2); "axes" by nothing. Matrices are not counted among the bytes.
    shaped: channels are rounded one after the other, and later ones make up for what earlier ones lose, as Q says.
    clip: the range that is rounded to is the one with the least squared error, not that from least to greatest.
    group: values of a row that share a step, 0: all; not with channels.
    narrow: part of the range from least to greatest that is rounded to, in 2 bits.
    """

    center: bool = False
    spread: bool = False
    root: bool = False
    first: bool = False
    rotate: bool = False
    balance: bool = False
    channels: bool = False
    asked: str = ""
    shaped: bool = False
    clip: bool = False
    group: int = 0
    narrow: float = 1.0


def hadamard(width: int, like: Tensor) -> Float[Tensor, "D D"]:
    """Returns the orthonormal Hadamard matrix of a power of two, by Sylvester's construction; it is symmetric."""
    if width & (width - 1):
        raise ValueError(f"expected a head width that is a power of two to rotate, got {width}: take a way without")
    one = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(one) < width:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    return one / math.sqrt(width)


def restored(
    x: Float[Tensor, "N D"],
    offsets: Int32[Tensor, " H1"],
    bits: int,
    way: Way,
    asked: Sequence[Float[Tensor, "H D D"]] | None = None,
) -> Float[Tensor, "N D"]:
    """Returns the rows as they come back from `bits` bits, in float32 and then in x's dtype; 16 bits are unchanged.

    `asked` has the second moments of what the rows of each head are multiplied with, and of rows if not of these.
    """
    if bits >= 16 or len(x) == 0:
        return x
    values, head = x.float(), owners(offsets, len(x))
    found = measure_channels(x, offsets)
    center = found.center[head] if way.center else torch.zeros((), device=x.device)
    spread = found.spread[head] if way.spread else torch.ones((), device=x.device)
    if way.root:
        spread = roots_of(values - center, offsets)[head]
    rest = (values - center) / spread
    turn = hadamard(x.shape[1], rest) if way.rotate else torch.eye(x.shape[1], device=x.device)
    there = again = turn.expand(len(offsets) - 1, -1, -1)
    if way.asked and asked is not None:
        before, after = matched(asked[1] if len(asked) > 1 else moments_of(rest, offsets), asked[0], way.asked)
        there, again = before @ turn, turn @ after
    if way.first:
        begin = offsets[:-1].long()
        own = (rest[begin][:, None] @ there)[:, 0]
        lost = ((own - rounded(own, bits, way))[:, None] @ again)[:, 0] * spread[begin]
        center = center + lost[head]
        rest = (values - center) / spread
    rest = by_head(rest, offsets, there)
    if way.shaped and asked is not None:
        back = _shaped(rest, offsets, bits, again @ asked[0] @ again.mT)
    else:
        back = _blocked(rest, offsets, bits, way) if way.balance or way.channels else rounded(rest, bits, way)
    return (by_head(back, offsets, again) * spread + center).to(x.dtype)


def rounded(x: Float[Tensor, "*B D"], bits: int, way: Way) -> Float[Tensor, "*B D"]:
    """Returns rows rounded each on its own, with 16-bit steps and zeros, group after group."""
    groups = x.unflatten(-1, (-1, way.group or x.shape[-1]))
    return _rounded(groups, bits, -1, way.clip, way.narrow if bits == 2 else 1.0).flatten(-2)


def roots_of(x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"]) -> Float[Tensor, "H D"]:
    """Returns the square roots of the deviations of each head's channels; the first row, an outlier, does not count."""
    found = [own[1:].square().mean(0).pow(0.25) for own in x.split(offsets.diff().tolist())]
    return torch.stack(found).nan_to_num(1.0).clamp_min(1e-6)


def stored_bytes(counts: list[int], width: int, bits: int, way: Way, element: int) -> int:
    """Returns the bytes of a layer's keys, or of its values, with counts[h] rows in head h; `element` those of 16."""
    rows = sum(counts)
    if bits >= 16:
        return rows * width * element
    blocks = sum(math.ceil(count / BLOCK) for count in counts)
    size = rows * math.ceil(width * bits / 8)
    size += blocks * width * 4 if way.channels else rows * 4 * (width // (way.group or width))
    if way.balance:  # one factor per row where steps are the channels', and one per channel where they are the rows'
        size += 2 * rows if way.channels else blocks * width * 2
    return size + (way.center + (way.spread or way.root) + (way.asked == "scale")) * len(counts) * width * 4


def by_head(x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"], by: Float[Tensor, "H D D"]) -> Float[Tensor, "N D"]:
    """Returns the rows of each head multiplied by its matrix."""
    return torch.cat([own @ m for own, m in zip(x.split(offsets.diff().tolist()), by, strict=True)])


def matched(
    rows: Float[Tensor, "H D D"], asked: Float[Tensor, "H D D"], how: str
) -> tuple[Float[Tensor, "H D D"], Float[Tensor, "H D D"]]:
    """Returns for each head what its rows, of these second moments, are multiplied by before and after rounding."""
    rows, asked = rows.double(), asked.double()
    if how == "scale":
        ratio = asked.diagonal(dim1=1, dim2=2).clamp_min(1e-12) / rows.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
        factor = ratio.pow(0.25)
        return factor.diag_embed().float(), (1 / factor).diag_embed().float()
    if how == "axes":
        one = torch.eye(rows.shape[1], device=rows.device).expand_as(rows)
        return one, one
    rows, asked = (m + 1e-3 * _trace(m) / m.shape[1] * torch.eye(m.shape[1], device=m.device) for m in (rows, asked))
    half, less = _power(rows, 0.5), _power(rows, -0.5)
    if how == "white":
        return less.float(), half.float()
    mean = less @ _power(half @ asked @ half, 0.5) @ less
    return _power(mean, 0.5).float(), _power(mean, -0.5).float()


def moments_of(x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"]) -> Float[Tensor, "H D D"]:
    """Returns the second moment of the rows of each head."""
    return torch.stack([own.mT @ own / max(1, len(own)) for own in x.split(offsets.diff().tolist())])


def _trace(m: Float[Tensor, "H D D"]) -> Float[Tensor, "H 1 1"]:
    return m.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-12)


def _power(m: Float[Tensor, "H D D"], exponent: float) -> Float[Tensor, "H D D"]:
    values, vectors = torch.linalg.eigh(m)
    return vectors * values.clamp_min(1e-12).pow(exponent)[:, None] @ vectors.mT


def moments(model: Model, cache: DenseCache, chunk: int) -> dict[int, Float[Tensor, "H D D"]]:
    """Returns the second moment of the queries that each KV head of each scored layer is asked by in the repeats."""
    found: dict[int, Tensor] = {}

    def look(layer: int, q: Tensor, *_: Tensor) -> None:
        own = q.float().unflatten(0, (cache.heads, -1)).flatten(1, 2)
        found[layer] = found.get(layer, 0) + own.mT @ own / own.shape[1]

    def strategy(first: int, stop: int) -> Attend:
        return repeat_attend(model.config, cache.layers, look, start=cache.start, first=first, stop=stop)

    with torch.no_grad():
        run_repeats(model, list(repeats(model, cache, chunk=chunk, hint=8)), cache.length, strategy)
    return found


def _shaped(
    x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"], bits: int, asked: Float[Tensor, "H D D"]
) -> Float[Tensor, "N D"]:
    """Rounds channel after channel; the error of each is made up for by those after it (GPTQ, arXiv 2210.17323)."""
    width = x.shape[1]
    matrix = asked.double() + 1e-2 * _trace(asked.double()) / width * torch.eye(width, device=x.device)
    upper, head = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True).float(), owners(offsets, len(x))
    low, high = x.amin(1), x.amax(1)
    step, zero = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-30), low.half().float()
    target, back = x.clone(), torch.empty_like(x)
    for d in range(width):
        codes = ((target[:, d] - zero) / step).round().clamp(0, 2**bits - 1)
        back[:, d] = codes * step + zero
        off = (target[:, d] - back[:, d]) / upper[head, d, d]
        target[:, d + 1 :] -= off[:, None] * upper[head, d, d + 1 :]
    return back


def _blocked(x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"], bits: int, way: Way) -> Float[Tensor, "N D"]:
    """Rounds blocks of 128 rows of a head. A shorter block repeats rows, which keeps ends and about the deviations."""
    rows, used = blocks_of(offsets, len(x))
    tile = x[rows]  # [blocks 128 D]
    row, channel = _balanced(tile) if way.balance else (torch.ones_like(tile[..., :1]), torch.ones_like(tile[:, :1]))
    back = _rounded(tile / row / channel, bits, 1 if way.channels else 2, way.clip) * row * channel
    out = torch.empty_like(x)
    out[rows[used]] = back[used]
    return out


def blocks_of(offsets: Int32[Tensor, " H1"], rows: int) -> tuple[Int64[Tensor, "b 128"], Bool[Tensor, "b 128"]]:
    """Returns the rows of each block of 128 of a head, and which places of a block are not repeated rows."""
    found, used = [], []
    for begin, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        for at in range(begin, end, BLOCK):
            count = min(BLOCK, end - at)
            place = torch.arange(BLOCK, device=offsets.device)
            found.append(at + place % count)
            used.append(place < count)
    return torch.stack(found), torch.stack(used)


def _balanced(tile: Float[Tensor, "b n D"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b 1 D"]]:
    """Factors of rows and channels by which a block is divided: of 16 rounds those with the most equal deviations."""
    tile = tile / tile.std((1, 2), keepdim=True).clamp_min(1e-12)  # the bounds below are for entries near 1
    row, channel = torch.zeros_like(tile[..., :1]), torch.zeros_like(tile[:, :1])
    best, kept = torch.full_like(row[:, :1], torch.inf), (row, channel)
    for _ in range(_ROUNDS):
        now = tile * torch.exp(-row - channel)
        uneven = sum(s.amax((1, 2), True) / s.amin((1, 2), True) for s in (_deviation(now, 2), _deviation(now, 1)))
        better = uneven < best
        best = torch.where(better, uneven, best)
        kept = (torch.where(better, row, kept[0]), torch.where(better, channel, kept[1]))
        row = (row + _deviation(now, 2).log()).clamp(-0.3, 10)
        channel = (channel + _deviation(tile * torch.exp(-row - channel), 1).log()).clamp(-0.3, 10)
    return kept[0].exp().half().float(), kept[1].exp().half().float()


def _deviation(x: Tensor, dim: int) -> Tensor:
    return x.std(dim, keepdim=True).clamp(1e-3, 1e3)


def _rounded(x: Tensor, bits: int, dim: int, clip: bool, narrow: float = 1.0) -> Tensor:
    """Rounds x with a step and a zero along an axis: from the least to the greatest value, or within them."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best, least = None, None
    for part in _SHRUNK if clip else (narrow,):
        step = (2 * part * half / (2**bits - 1)).half().float()
        zero = (middle - part * half).half().float()
        codes = ((x - zero) / step.clamp_min(1e-30)).round().clamp(0, 2**bits - 1)
        back = codes * step + zero
        off = (back - x).square().sum(dim, keepdim=True)
        if best is None or least is None:
            best, least = back, off
        else:
            best, least = torch.where(off < least, back, best), torch.minimum(off, least)
    assert best is not None
    return best
