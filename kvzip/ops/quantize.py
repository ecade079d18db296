"""Packs rows into 8 or 4 bits, with a scale and a zero for each group of values."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvzip.ops.backend import use_triton


@dataclass(frozen=True)
class Quantized:
    """N rows of D values: value[n, d] = zero[n, d // group] + scale[n, d // group] * code[n, d].

    With 8 bits byte d is code d; with 4 bits byte i is code 2i in its high half and code 2i + 1 in its low half.
    """

    codes: UInt8[Tensor, "N P"]  # P = D * bits / 8
    scale: Float[Tensor, "N Q"]  # Q = D / group; float16 or float32
    zero: Float[Tensor, "N Q"]
    bits: int
    group: int


def quantize(x: Float[Tensor, "N D"], *, bits: int, group: int | None = None) -> Quantized:
    """The rows of x as codes of `bits` bits, asymmetric: code 0 is the least value of a group, the last its greatest.

    zero = min, scale = (max - min) / (2**bits - 1), code = floor((x - zero) / scale + 1/2), all in float32 with the
    scale and zero as they are stored. Restored values are then within half a step (scale / 2) of x, rows of one value
    are exact, and a group that spans more than float32 holds is clipped to it, so finite values stay finite.

    Scale and zero are float16 where that loses nothing that matters: every zero exact, and no scale so small that
    rounding it moves the group's greatest value by more than half a step. Otherwise, and for float32 rows, all are
    float32. Choosing waits for the device.

    Args:
        bits: 8 or 4.
        group: values that share a scale, min(128, D) if not given.

    Raises: ValueError if bits is neither, D is not divisible by group, x is not finite, or 4 bits meet an odd group;
        TypeError for a float64 x.
    """
    group = min(128, x.shape[1]) if group is None else group
    _check(x, bits, group)
    return _quantize_op(x)(x, bits=bits, group=group)


def dequantize(q: Quantized, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N D"]:
    """The values that the codes stand for, computed in float32 and rounded once to dtype."""
    return _dequantize_op(q.codes)(q, dtype=dtype)


def quantize_reference(x: Float[Tensor, "N D"], *, bits: int, group: int | None = None) -> Quantized:
    group = min(128, x.shape[1]) if group is None else group
    last = 2**bits - 1
    groups = x.float().unflatten(1, (-1, group))  # [N Q group]
    if not groups.isfinite().all():
        raise ValueError(NOT_FINITE)
    zero, highest = groups.amin(dim=2), groups.amax(dim=2)
    steps = torch.full_like(zero, last)  # a tensor: by a number, CUDA multiplies with its rounded reciprocal
    scale = (highest / steps - zero / steps).clamp(max=LARGEST / last)
    if x.dtype != torch.float32 and _half_holds(scale, zero, last):
        scale, zero = scale.half(), zero.half()
    codes = (groups - zero.float()[..., None]) / scale.float()[..., None]
    codes = codes.where(scale[..., None] > 0, 0.0)
    codes = (codes + 0.5).floor().clamp(0, last).to(torch.uint8).flatten(1)
    if bits == 4:
        codes = codes[:, 0::2] << 4 | codes[:, 1::2]
    return Quantized(codes, scale, zero, bits, group)


def dequantize_reference(q: Quantized, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N D"]:
    codes = q.codes if q.bits == 8 else torch.stack([q.codes >> 4, q.codes & 15], dim=2).flatten(1)
    steps = codes.float().unflatten(1, (-1, q.group))
    return (steps * q.scale.float()[..., None] + q.zero.float()[..., None]).flatten(1).to(dtype)


LARGEST = torch.finfo(torch.float32).max
NOT_FINITE = "expected finite values, got inf or NaN: they have no scale; check the forward pass that made them"


def _half_holds(scale: Float[Tensor, "N Q"], zero: Float[Tensor, "N Q"], last: int) -> bool:
    lost = (scale.half().float() - scale).abs() * last
    return bool(((zero.half().float() == zero) & (lost <= scale * 0.5)).all())


def _quantize_op(x: Tensor):
    if not use_triton(x):
        return quantize_reference
    from kvzip.ops.triton.quantize import quantize_triton

    return quantize_triton


def _dequantize_op(codes: Tensor):
    if not use_triton(codes):
        return dequantize_reference
    from kvzip.ops.triton.quantize import dequantize_triton

    return dequantize_triton


def _check(x: Tensor, bits: int, group: int) -> None:
    if x.dtype == torch.float64:
        raise TypeError("expected bfloat16, float16 or float32 rows, got float64: convert them first")
    if bits not in (8, 4):
        raise ValueError(f"expected bits to be 8 or 4, got {bits}: other widths have no packing")
    if group < 1 or x.shape[1] % group:
        raise ValueError(f"expected D divisible by group, got D={x.shape[1]} and group={group}: pass group=D")
    if bits == 4 and group % 2:
        raise ValueError(f"expected an even group for 4 bits (a byte holds two codes), got {group}: pass an even one")
