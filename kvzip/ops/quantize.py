"""Quantizes rows to 8, 4 or 2 bits, with a scale and a zero for each group of values."""

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.turning import turn
from kvzip.ops.types import DEEP, LARGEST, LEAST, NOT_FINITE, SMALL, Channels, Quantized, divided, group_of, owners

_SAMPLE = 256  # rows of a head from which its channels are measured
_ROWS_AT_ONCE = 1 << 18  # rows whose rest is computed in float32 at a time


def quantize(
    x: Float[Tensor, "N D"],
    *,
    bits: int,
    group: int | None = None,
    offsets: Int32[Tensor, " H1"] | None = None,
    channels: Channels | None = None,
) -> Quantized:
    """Returns x quantized to `bits` bits, asymmetric: code 0 is a group's least value, the last code its greatest.

    zero = min, scale = (max - min) / (2**bits - 1), code = floor((x - zero) / scale + 1/2), all in float32 with the
    scale and zero as they are stored. Dequantized values are then within half a step (scale / 2) of x, up to float32's
    rounding, and rows of one value are exact. Finite rows stay finite: a subnormal scale is rounded up, and a group
    whose max - min overflows float32 is computed from halves of its values.

    Scales and zeros are float16 if all zeros are exact in it and no scale's rounding moves its group's greatest value
    by more than half a step; otherwise, and for float32 rows, they are float32. The choice waits for the device.

    Args:
        bits: 8, 4 or 2.
        group: values that share a scale, `group_of(D)` if not given.
        offsets: rows offsets[h]:offsets[h + 1] are those of head h. What is packed is then their rest (see `Channels`),
            rounded to float16, or to float32 if x is float32 or a rest overflows float16.
        channels: of these heads, measured on other rows of theirs; a rest beyond float32 is then clipped. None measures
            them: the mean, and the largest distance from it, of up to 256 rows spread over each head.

    Raises: ValueError if bits is none of these, D is not divisible by group, x is not finite, a group's codes fill no
        whole bytes, or there are channels without offsets; TypeError for a float64 x.
    Source: per-channel scales of keys as in KIVI, arXiv 2402.02750, here one per head, multiplied into the query.
    """
    group = group_of(x.shape[1]) if group is None else group
    _check(x, bits, group)
    if offsets is None:
        if channels is not None:
            raise ValueError("expected offsets with channels, got none: they say which rows are which head's")
        return _pack(x, bits, group)
    found = measure_channels(x, offsets) if channels is None else channels
    try:
        dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
        return replace(_pack(_rest(x, offsets, found, dtype), bits, group), channels=found)
    except ValueError:  # raised for a rest that is not finite: x is not, or its spread overflows `dtype`
        if not x.isfinite().all():
            raise
    found = _widen(found, x, offsets) if channels is None else found
    rest = _rest(x, offsets, found, torch.float32, wide=torch.float64)
    return replace(_pack(rest, bits, group), channels=found)


def dequantize(
    q: Quantized, *, dtype: torch.dtype = torch.float32, offsets: Int32[Tensor, " H1"] | None = None
) -> Float[Tensor, "N D"]:
    """Returns the values of quantized rows, computed in float32, clamped to dtype's range and rounded once.

    Args:
        offsets: of the heads that own the rows; needed where `q` has channels.

    Raises: ValueError for channels without offsets.
    """
    if q.channels is None and not q.turned:
        return _unpack(q, dtype)
    if q.channels is not None and offsets is None:
        raise ValueError("expected offsets, got none: the rows have channels, and offsets say which head's")
    rest = _unpack(q, torch.float32)
    rest = turn(rest) if q.turned else rest
    most = torch.finfo(dtype).max
    if q.channels is not None and offsets is not None:
        head = owners(offsets, len(q.codes))
        rest = rest.mul_(q.channels.spread[head]).add_(q.channels.center[head])
    return rest.clamp_(-most, most).to(dtype)


def packed_nbytes(rows: int, width: int, *, bits: int, scale: int, heads: int = 0) -> int:
    """Returns the bytes of what `quantize` returns for so many rows, with groups as it takes them.

    Args:
        scale: bytes of a scale, and of a zero: 2 or 4.
        heads: whose channels are measured, 0 without offsets.
    """
    return rows * (width * bits // 8 + 2 * scale * (width // group_of(width))) + 8 * heads * width


def take_rows(q: Quantized, rows: Tensor | slice) -> Quantized:
    """Returns some of the rows, by an index, a mask or a slice, with unchanged channels."""
    return replace(q, codes=q.codes[rows], scale=q.scale[rows], zero=q.zero[rows])


def measure_channels(x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"]) -> Channels:
    """Returns center and spread of each head's channels, without a host sync; a head without rows has 0 and 1.

    The spread is the power of two nearest to the largest distance from the center, 1 where that is 0 or not finite.
    """
    heads, width = len(offsets) - 1, x.shape[1]
    if len(x) == 0:
        return Channels(*(x.new_full((heads, width), value, dtype=torch.float32) for value in (0.0, 1.0)))
    counts = offsets.diff().long()[:, None]
    rows = offsets[:-1, None] + torch.arange(_SAMPLE, device=x.device) * counts // _SAMPLE  # a short head repeats rows
    sample = x[rows.clamp(max=len(x) - 1)].float()  # [H _SAMPLE D]
    center = sample.mean(1).masked_fill(counts == 0, 0)
    power = (sample - center[:, None]).abs().amax(1).log2().round().clamp(-60, 60)
    usable = power.isfinite() & (counts > 0) & (power > -60)
    return Channels(center.where(center.isfinite(), 0.0), torch.exp2(power.where(usable, 0.0)))


def _rest(
    x: Float[Tensor, "N D"],
    offsets: Int32[Tensor, " H1"],
    channels: Channels,
    dtype: torch.dtype,
    wide: torch.dtype = torch.float32,
) -> Float[Tensor, "N D"]:
    """(x - center) / spread of each row's head, computed in `wide`; with float64 clipped to float32's range."""
    rest = torch.empty_like(x, dtype=dtype)
    for out, rows, head in zip(*(t.split(_ROWS_AT_ONCE) for t in (rest, x, owners(offsets, len(x)))), strict=True):
        part = (rows.to(wide) - channels.center[head]) / channels.spread[head]
        out.copy_(part.clamp_(-LARGEST, LARGEST) if wide == torch.float64 else part)
    return rest


def _widen(channels: Channels, x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"]) -> Channels:
    """The channels with spreads large enough for the rest of every row, not only the measured ones, to fit float32."""
    head = owners(offsets, len(x))
    apart = (x.double() - channels.center[head]).abs()
    farthest = apart.new_zeros(channels.spread.shape).scatter_reduce_(0, head[:, None].expand_as(x), apart, "amax")
    least = torch.exp2((farthest.log2() - 120).ceil().clamp(min=-60)).float()
    return replace(channels, spread=torch.maximum(channels.spread, least))


def _pack(x: Float[Tensor, "N D"], bits: int, group: int) -> Quantized:
    if use_triton(x):
        from kvzip.ops.triton.quantize import quantize_triton as run
    else:
        run = quantize_reference
    return run(x, bits=bits, group=group)


def _unpack(q: Quantized, dtype: torch.dtype) -> Float[Tensor, "N D"]:
    if use_triton(q.codes):
        from kvzip.ops.triton.quantize import dequantize_triton as run
    else:
        run = dequantize_reference
    return run(q, dtype=dtype)


def quantize_reference(x: Float[Tensor, "N D"], *, bits: int, group: int | None = None) -> Quantized:
    group = group_of(x.shape[1]) if group is None else group
    last = 2**bits - 1
    groups = x.float().unflatten(1, (-1, group))  # [N Q group]
    if not groups.isfinite().all():
        raise ValueError(NOT_FINITE)
    zero, highest = groups.amin(dim=2), groups.amax(dim=2)
    scale = divided(highest, last) - divided(zero, last)
    small = (highest > zero) & (highest - zero < SMALL)  # subnormal quotients are multiples of LEAST
    scale = scale.where(~small, scale + LEAST)
    if x.dtype != torch.float32:
        lost = (scale.half().float() - scale).abs() * last
        if ((zero.half().float() == zero) & (lost <= scale * 0.5)).all():
            scale, zero = scale.half(), zero.half()
    part = _part(zero)[..., None]
    codes = (groups * part - zero.float()[..., None] * part) / (scale.float()[..., None] * part)
    codes = codes.where(scale[..., None] > 0, 0.0)
    codes = (codes + 0.5).floor().clamp(0, last).flatten(1)
    return Quantized(pack_codes(codes, bits), scale, zero, bits, group)


def pack_codes(codes: Float[Tensor, "N D"], bits: int) -> UInt8[Tensor, "N P"]:
    """Returns codes as bytes, the first of a byte in its highest bits."""
    parts = codes.to(torch.uint8).unflatten(1, (-1, 8 // bits))
    return (parts << _shifts(bits, codes.device)).sum(2, dtype=torch.uint8)


def dequantize_reference(q: Quantized, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N D"]:
    codes = (q.codes[..., None] >> _shifts(q.bits, q.codes.device) & 2**q.bits - 1).flatten(1)
    steps, part, most = codes.float().unflatten(1, (-1, q.group)), _part(q.zero)[..., None], torch.finfo(dtype).max
    values = steps * (q.scale.float()[..., None] * part) + q.zero.float()[..., None] * part
    return (values.clamp(-most * part, most * part) / part).flatten(1).to(dtype)


def _shifts(bits: int, device: torch.device) -> UInt8[Tensor, " c"]:
    """Where the codes of a byte begin, the first in its highest bits."""
    return torch.arange(8 - bits, -1, -bits, device=device).to(torch.uint8)


def _part(zero: Float[Tensor, "N Q"]) -> Float32[Tensor, "N Q"]:
    """The factor on a group's values that keeps their differences within float32: 1, or 1/2."""
    return torch.where(zero.float() < DEEP, 0.5, 1.0)


def _check(x: Tensor, bits: int, group: int) -> None:
    if x.dtype == torch.float64:
        raise TypeError("expected bfloat16, float16 or float32 rows, got float64: convert them first")
    if bits not in (8, 4, 2):
        raise ValueError(f"expected bits to be 8, 4 or 2, got {bits}: other widths have no packing")
    if group < 1 or x.shape[1] % group:
        raise ValueError(f"expected D divisible by group, got D={x.shape[1]} and group={group}: pass group=D")
    if group % (8 // bits):
        raise ValueError(
            f"expected a group of whole bytes in {bits} bits (a byte holds {8 // bits} codes), got {group}: pass a "
            f"multiple of {8 // bits}"
        )
