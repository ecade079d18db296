"""Turning rows by a Hadamard matrix, and the channels of heads whose rows are turned."""

import math

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.types import Channels

SAMPLE = 256  # rows of a head from which its channels are measured
LEAST_PART = 2.0**-10  # of the mean deviation, which a channel's counts as at least
FIRST_PART = 2.0**-8  # of the first row's distance, likewise: few rows may be all alike, and that one be far


def turn(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Returns rows multiplied by an orthonormal Hadamard matrix, in float32 or float64. Turning twice gives them back.

    Each turned value is a sum of many channels with signs, so that all are about as large and few are far out: a step
    for the whole row then fits all of them. Where D is no power of two, b = D & -D channels after the other are turned.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    block = x.shape[-1] & -x.shape[-1]
    return (wide.unflatten(-1, (-1, block)) @ hadamard(block, like=wide)).flatten(-2)


def hadamard(size: int, *, like: Tensor) -> Float[Tensor, "D D"]:
    """Returns the orthonormal Hadamard matrix of a power of two: entry i, j is -1 to the number of bits of i & j."""
    place = torch.arange(size, device=like.device)
    odd = place[:, None] & place
    fold = 1 << max(size.bit_length() - 2, 0).bit_length()  # half of the bits that an index can have, or more
    while fold := fold // 2:
        odd = odd ^ odd >> fold
    return (1 - 2 * (odd & 1)).to(like.dtype) / math.sqrt(size)


def measure_roots(x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"]) -> Channels:
    """Returns centers and spreads of rows that are turned, from up to 256 rows of each head, without a host sync.

    The center is a channel's mean, and the spread sqrt(s * mean of s), s the channel's standard deviation. Rounding
    adds an error in proportion to the spread: halfway, in powers, between equal errors in all channels, which lose the
    small ones, and errors in proportion to the channels, which are too much where queries ask for large ones. Turned
    values then have the mean square 1. The first row does not count, unless it is the only one: it is far from others.
    """
    heads, width = len(offsets) - 1, x.shape[1]
    if len(x) == 0:
        return Channels(*(x.new_full((heads, width), value, dtype=torch.float32) for value in (0.0, 1.0)))
    counts = offsets.diff().long()[:, None]
    others = (counts - 1).clamp_min(1)
    rows = offsets[:-1, None] + (counts > 1) + torch.arange(SAMPLE, device=x.device) * others // SAMPLE
    sample = x[rows.clamp(max=len(x) - 1)].float()  # [H SAMPLE D]
    center = sample.mean(1)
    apart = sample - center[:, None]
    most = apart.abs().amax(1).clamp_min(2.0**-60)  # squares of what is divided by it do not overflow
    deviation = most * (apart / most[:, None]).square().mean(1).sqrt()
    first = x[offsets[:-1].long().clamp(max=len(x) - 1)].float()
    deviation = torch.maximum(deviation, FIRST_PART * (first - center).abs())
    mean = deviation.mean(1, keepdim=True)
    spread = torch.sqrt(torch.maximum(deviation, LEAST_PART * mean)) * mean.sqrt()
    usable = (counts > 1) & spread.isfinite() & (spread > 0)
    return Channels(center.where((counts > 0) & center.isfinite(), 0.0), spread.where(usable, 1.0))
