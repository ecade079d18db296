"""Packing of rows into 8, 4 or 2 bits, and back.

For each group of a row: zero = min, scale = max / last - min / last with last = 2**bits - 1 (so that the difference
cannot overflow), code = floor((x - zero) / scale + 1/2). Divisions are correctly rounded and nothing is fused, so the
codes are those of the reference bit for bit. Groups whose span overflows float32 are halved as there,
which only float32 scales need.

The first pass stores float16 scales and flags those that are too coarse; then a second pass stores float32
scales. Bytes: x read and the quantized rows written once, plus 2 * 2 bytes a group. Measured: docs/tuning.md.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import on_device
from kvzip.ops.types import DEEP, LEAST, NOT_FINITE, SMALL, Quantized, group_of

INFINITE, COARSE = tl.constexpr(0), tl.constexpr(1)  # indices of the flags


def launch_config(group: int) -> tuple[int, int]:
    """Rows of one program and its warps. Tuned on an H100, 2026-11-24: docs/tuning.md."""
    return max(1, 2048 // triton.next_power_of_2(group)), 4  # the smallest of the fastest


def quantize_triton(x: Float[Tensor, "N D"], *, bits: int, group: int | None = None) -> Quantized:
    group = group_of(x.shape[1]) if group is None else group
    if x.dtype != torch.float32:
        q, infinite, coarse = _quantize(x, bits, group, torch.float16)
    if x.dtype == torch.float32 or coarse:
        q, infinite, _ = _quantize(x, bits, group, torch.float32)
    if infinite:
        raise ValueError(NOT_FINITE)
    return q


@on_device
def dequantize_triton(q: Quantized, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N D"]:
    N, packed = q.codes.shape
    D = packed * 8 // q.bits
    values = torch.empty(N, D, dtype=dtype, device=q.codes.device)
    if values.numel() == 0:
        return values
    codes, scale, zero = q.codes.contiguous(), q.scale.contiguous(), q.zero.contiguous()
    block_n, warps = launch_config(q.group)
    _dequantize_kernel[(triton.cdiv(N, block_n), D // q.group)](
        codes, scale, zero, values, N,
        D=D, GROUP=q.group, BLOCK_G=triton.next_power_of_2(q.group), BITS=q.bits, MOST=torch.finfo(dtype).max,
        DEEP=DEEP, BLOCK_N=block_n,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return values


@on_device
def _quantize(x: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Quantized, bool, bool]:
    """The codes, with scales of the given dtype; whether a value was not finite, and whether `dtype` is too coarse."""
    N, D = x.shape
    codes = torch.empty(N, D * bits // 8, dtype=torch.uint8, device=x.device)
    scale, zero = (torch.empty(N, D // group, dtype=dtype, device=x.device) for _ in range(2))
    flags = torch.zeros(2, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return Quantized(codes, scale, zero, bits, group), False, False
    block_n, warps = launch_config(group)
    _quantize_kernel[(triton.cdiv(N, block_n), D // group)](
        x, codes, scale, zero, flags, N, *x.stride(),
        D=D, GROUP=group, BLOCK_G=triton.next_power_of_2(group), BITS=bits, LEAST=LEAST, SMALL=SMALL, DEEP=DEEP,
        BLOCK_N=block_n, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    infinite, coarse = flags.tolist()
    return Quantized(codes, scale, zero, bits, group), bool(infinite), bool(coarse)


@triton.jit
@no_type_check
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, flags_ptr, N, stride_xn, stride_xd, D: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr, SMALL: tl.constexpr, DEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = 2**BITS - 1
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    places = tl.arange(0, BLOCK_G)
    address = x_ptr + rows[:, None] * stride_xn + (group * GROUP + places)[None, :].to(tl.int64) * stride_xd
    inside = (rows < N)[:, None] & (places < GROUP)[None, :]
    x = tl.load(address, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_G]
    if tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1) > 0:  # false for NaN
        tl.store(flags_ptr + INFINITE, 1)

    zero = tl.min(tl.where(inside, x, float("inf")), axis=1)  # [BLOCK_N]
    highest = tl.max(tl.where(inside, x, float("-inf")), axis=1)
    valid = rows < N
    zero, highest = tl.where(valid, zero, 0.0), tl.where(valid, highest, 0.0)
    last = tl.full([BLOCK_N], LAST, tl.float32)
    scale = tl.div_rn(highest, last) - tl.div_rn(zero, last)
    scale = tl.where((highest > zero) & (highest - zero < SMALL), scale + LEAST, scale)
    stored_scale = scale.to(scale_ptr.dtype.element_ty)
    stored_zero = zero.to(scale_ptr.dtype.element_ty)
    tl.store(scale_ptr + rows * (D // GROUP) + group, stored_scale, mask=valid)
    tl.store(zero_ptr + rows * (D // GROUP) + group, stored_zero, mask=valid)
    lost = tl.abs(stored_scale.to(tl.float32) - scale) * LAST
    held = (stored_zero.to(tl.float32) == zero) & (lost <= scale * 0.5)
    if tl.max(held.to(tl.int32) ^ 1) > 0:
        tl.store(flags_ptr + COARSE, 1)

    zero, scale = stored_zero.to(tl.float32)[:, None], stored_scale.to(tl.float32)[:, None]
    if scale_ptr.dtype.element_ty == tl.float32:
        part = tl.where(zero < DEEP, 0.5, 1.0)
        x, zero, scale = x * part, zero * part, scale * part
    steps = tl.div_rn(x - zero, tl.broadcast_to(tl.where(scale > 0, scale, 1.0), [BLOCK_N, BLOCK_G]))
    steps = tl.where(scale > 0, steps, 0.0)
    codes = tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), LAST).to(tl.uint8)
    PACKED: tl.constexpr = GROUP * BITS // 8
    if BITS == 2:
        high, low = tl.split(tl.reshape(codes, [BLOCK_N, BLOCK_G // 2, 2]))
        codes = (high << 2) | low
    if BITS < 8:
        high, low = tl.split(tl.reshape(codes, [BLOCK_N, BLOCK_G * BITS // 8, 2]))
        codes = (high << 4) | low
    bytes = tl.arange(0, BLOCK_G * BITS // 8)
    to = codes_ptr + rows[:, None] * (D * BITS // 8) + group * PACKED + bytes[None, :]
    tl.store(to, codes, mask=valid[:, None] & (bytes < PACKED)[None, :])


@triton.jit
@no_type_check
def _dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, values_ptr, N, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    BITS: tl.constexpr, MOST: tl.constexpr, DEEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = GROUP * BITS // 8
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    valid = rows < N
    scale = tl.load(scale_ptr + rows * (D // GROUP) + group, mask=valid, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + rows * (D // GROUP) + group, mask=valid, other=0.0).to(tl.float32)
    bytes = tl.arange(0, BLOCK_G * BITS // 8)
    address = codes_ptr + rows[:, None] * (D * BITS // 8) + group * PACKED + bytes[None, :]
    codes = tl.load(address, mask=valid[:, None] & (bytes < PACKED)[None, :], other=0)
    if BITS < 8:
        codes = tl.reshape(tl.join(codes >> 4, codes & 15), [BLOCK_N, BLOCK_G * BITS // 4])
    if BITS == 2:
        codes = tl.reshape(tl.join(codes >> 2, codes & 3), [BLOCK_N, BLOCK_G])
    part = tl.where(zero < DEEP, 0.5, 1.0)
    values = codes.to(tl.float32) * (scale * part)[:, None] + (zero * part)[:, None]  # [BLOCK_N, BLOCK_G]
    most = (MOST * part)[:, None]
    values = tl.minimum(tl.maximum(values, -most), most) * (1 / part)[:, None]
    places = tl.arange(0, BLOCK_G)
    to = values_ptr + rows[:, None] * D + group * GROUP + places[None, :]
    tl.store(to, values.to(values_ptr.dtype.element_ty), mask=valid[:, None] & (places < GROUP)[None, :])
