"""The linear layer with weights in 8 or 4 bits: few rows by a kernel that expands codes in registers.

Weights are the rows (M) of tensor cores' products, so that eight columns are enough for one row of x. The inputs of a
tile are cut into slices, one for each warp, whose sums are added at the end: then few outputs make a program, and many
programs share the reading evenly. Scales multiply sums of a group, codes themselves are exact in 16 bits.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.codes import convert, unpacking, within_group
from kvzip.ops.triton.common import (
    activate,
    add_product,
    await_launch,
    compute_dtype,
    interpreted,
    launch_options,
    on_device,
    overlaps_launches,
    prefetch_starts,
)
from kvzip.ops.triton.norm import rms_norm_triton
from kvzip.ops.types import Norm
from kvzip.ops.weights import QuantizedWeight


class Launch(NamedTuple):
    """Sizes of one launch: outputs and bytes of a slice, slices of a tile, warps, tiles in flight, bytes ahead."""

    block_n: int
    block_bytes: int
    slices: int
    warps: int
    stages: int
    ahead: int = 1024  # of each row, to L2, before the wait for the launch in front
    fused: bool = True  # whether one row is normed within, not by a launch before


_VARIANTS = (
    Launch(16, 128, 4, 4, 4),
    Launch(16, 64, 4, 4, 4),
    Launch(32, 128, 4, 4, 3),
    Launch(16, 128, 4, 4, 4, ahead=0),
    Launch(16, 128, 4, 4, 4, ahead=2048),
    Launch(16, 128, 4, 4, 4, fused=False),
    Launch(16, 128, 2, 2, 4),
    Launch(16, 256, 4, 4, 3),
    Launch(16, 128, 8, 8, 3),
    Launch(16, 128, 4, 4, 6),
)
LAUNCHES = {"e4m3": _VARIANTS, "int8": _VARIANTS, "int4": (Launch(16, 64, 4, 4, 4), Launch(16, 64, 8, 8, 3))}
"""What `benchmarks/ops.py --only linear --launches` times for one row, by kind."""


def launch_config(kind: str, x: Tensor) -> Launch:
    """The launch for rows of x. Tuned on an H100, 2026-11-27: docs/tuning.md."""
    if x.dtype == torch.float32:
        return Launch(16, 32, 4, 4, 2)  # plain products without tensor cores
    return Launch(16, 64 if kind == "int4" else 128, 4, 4, 4)


def most_rows(x: Tensor) -> int:
    """The most rows whose weights are expanded in registers, here or by `few_columns`; of float32 they allow fewer."""
    return 8 if x.dtype == torch.float32 else 64


@on_device
def few_rows(
    x: Float[Tensor, "*b K"],
    weight: QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
    config: Launch | None = None,
) -> Float[Tensor, "*b M"]:
    """`linear` of up to 16 rows of 8 bits, and of one of 4 bits, as one launch that reads every code once.

    `few_columns` is the faster one from 9 rows on, for weights that it takes.

    Several rows are normed by a launch before.
    """
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    x = x.contiguous()
    whole = weight.group == inputs  # one scale for each output: it multiplies the sums
    config = config or launch_config(weight.kind, x)
    config = config._replace(block_bytes=within_group(config.block_bytes, weight))
    if norm is not None and (rows > 1 or not config.fused):
        x, norm = rms_norm_triton(x, norm.weight, eps=norm.eps, offset=norm.offset), None
    N = outputs if gate is None else outputs // 2
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    overlap, compute = overlaps_launches(x), compute_dtype(x)
    packed = not interpreted() and x.dtype != torch.float32
    low, high = (unpacking(weight.kind, high, compute) if packed else "" for high in (False, True))
    _quantized_kernel[(triton.cdiv(N, config.block_n),)](
        x, weight.codes.view(torch.uint8), weight.scale, weight.scale if weight.zero is None else weight.zero,
        x if bias is None else bias, x if norm is None else norm.weight,
        x if residual is None else residual.contiguous(), out, N, rows, 0.0 if norm is None else float(norm.eps),
        K=inputs, P=weight.codes.shape[1], Q=weight.scale.shape[1], GROUP=weight.group, SHARED=weight.rows,
        KIND=weight.kind, ZERO=weight.zero is not None, WHOLE=whole,
        BLOCK_N=config.block_n, BLOCK_B=config.block_bytes, SLICES=config.slices, STAGES=config.stages,
        BLOCK_R=max(8, triton.next_power_of_2(rows)), ONE=rows == 1,
        AHEAD=min(config.ahead, weight.codes.shape[1]) if overlap else 0,
        OFFSET=0 if norm is None else norm.offset, NORM=norm is not None, GATE=gate or "", BIAS=bias is not None,
        RESIDUAL=residual is not None, COMPUTE=compute, LOW=low, HIGH=high,
        OVERLAP=overlap, num_warps=config.warps, enable_fp_fusion=True, **launch_options(overlap),
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _partial(total, codes, x, x_high, zero, KIND: tl.constexpr, ZERO: tl.constexpr, COMPUTE: tl.constexpr,
             LOW: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """total + the products of a tile's codes, less their zero points, and inputs: [SLICES, BLOCK_N, BLOCK_R]."""
    w = convert(codes, LOW, KIND, False, COMPUTE)
    if ZERO:
        w -= zero[:, :, None].to(COMPUTE)
    total = add_product(total, w, x)
    if KIND == "int4":
        w = convert(codes, HIGH, KIND, True, COMPUTE)
        if ZERO:
            w -= zero[:, :, None].to(COMPUTE)
        total = add_product(total, w, x_high)
    return total


@triton.jit
@no_type_check
def _steps(ptr, owner, start, Q: tl.constexpr, SLICES: tl.constexpr, UNIT: tl.constexpr, BLOCK_B: tl.constexpr):
    """Scales or zero points of the outputs and slices of the tile that begins at byte `start`: [SLICES, BLOCK_N]."""
    g = tl.minimum((start + tl.arange(0, SLICES) * BLOCK_B) // UNIT, Q - 1)
    return tl.load(ptr + owner[None, :] + g[:, None])


@triton.jit
@no_type_check
def _inputs(x_ptr, norm_ptr, k, r, K: tl.constexpr, OFFSET: tl.constexpr, NORM: tl.constexpr, ONE: tl.constexpr,
            WHOLE_TILES: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Inputs k of all rows, times the norm's weights: [SLICES, BLOCK_B, BLOCK_R]; and the squares of one row's."""
    square = tl.zeros([k.shape[0], k.shape[1]], tl.float32)
    if ONE:
        if WHOLE_TILES:
            x = tl.load(x_ptr + k)  # [SLICES, BLOCK_B]
        else:
            x = tl.load(x_ptr + k, mask=k < K, other=0)
        if NORM:
            square = x.to(tl.float32) * x.to(tl.float32)
            if WHOLE_TILES:
                weight = tl.load(norm_ptr + k)
            else:
                weight = tl.load(norm_ptr + k, mask=k < K, other=0)
            if OFFSET == 0:  # a product of 16-bit numbers is rounded once either way
                x = x * weight
            else:
                x = x.to(tl.float32) * (weight.to(tl.float32) + OFFSET)
        return tl.broadcast_to(x.to(COMPUTE)[:, :, None], [k.shape[0], k.shape[1], BLOCK_R]), square
    else:
        at = x_ptr + r.to(tl.int64)[None, None, :] * K + k[:, :, None]
        if WHOLE_TILES:
            return tl.load(at).to(COMPUTE), square
        else:
            return tl.load(at, mask=(k < K)[:, :, None], other=0).to(COMPUTE), square


@triton.jit(do_not_specialize=["N", "rows"])
@no_type_check
def _quantized_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, N, rows, eps,
    K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, SLICES: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_R: tl.constexpr, ONE: tl.constexpr, AHEAD: tl.constexpr, OFFSET: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, COMPUTE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all rows."""
    EACH: tl.constexpr = 2 if KIND == "int4" else 1
    TILE: tl.constexpr = SLICES * BLOCK_B
    WHOLE_TILES: tl.constexpr = P % TILE == 0 and K == P * EACH
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bounded = tl.minimum(n, N - 1)
    second = bounded + N  # where gated
    r = tl.minimum(tl.arange(0, BLOCK_R), rows - 1)
    part = tl.arange(0, SLICES)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]  # [SLICES, BLOCK_B]
    at = codes_ptr + bounded.to(tl.int64)[None, :, None] * P + part[:, None, :]  # [SLICES, BLOCK_N, BLOCK_B]
    at_2 = codes_ptr + second.to(tl.int64)[None, :, None] * P + part[:, None, :]
    owner = (bounded // SHARED).to(tl.int64) * Q
    owner_2 = (second // SHARED).to(tl.int64) * Q
    if AHEAD:  # weights do not depend on the kernel before
        prefetch_starts(codes_ptr + bounded.to(tl.int64) * P, AHEAD)
        if GATE != "":
            prefetch_starts(codes_ptr + second.to(tl.int64) * P, AHEAD)
    await_launch(OVERLAP)
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_R], tl.float32)
    acc_2 = acc
    none = acc
    square = tl.zeros([SLICES, BLOCK_B], tl.float32)
    zero = tl.zeros([SLICES, BLOCK_N], tl.int8)
    zero_2 = zero
    UNIT: tl.constexpr = GROUP // EACH  # bytes of a group
    if WHOLE:
        if ZERO:
            zero += tl.load(zero_ptr + owner)[None, :]
            if GATE != "":
                zero_2 += tl.load(zero_ptr + owner_2)[None, :]
    else:  # those of a tile are loaded while the one before it is multiplied
        scale = _steps(scale_ptr, owner, 0, Q, SLICES, UNIT, BLOCK_B)
        scale_2 = scale
        if GATE != "":
            scale_2 = _steps(scale_ptr, owner_2, 0, Q, SLICES, UNIT, BLOCK_B)
        if ZERO:
            zero = _steps(zero_ptr, owner, 0, Q, SLICES, UNIT, BLOCK_B)
            if GATE != "":
                zero_2 = _steps(zero_ptr, owner_2, 0, Q, SLICES, UNIT, BLOCK_B)
    for start in tl.range(0, P, TILE, num_stages=STAGES):
        b = start + part
        if not WHOLE:
            later = _steps(scale_ptr, owner, start + TILE, Q, SLICES, UNIT, BLOCK_B)
            if GATE != "":
                later_2 = _steps(scale_ptr, owner_2, start + TILE, Q, SLICES, UNIT, BLOCK_B)
            if ZERO:
                later_zero = _steps(zero_ptr, owner, start + TILE, Q, SLICES, UNIT, BLOCK_B)
                if GATE != "":
                    later_zero_2 = _steps(zero_ptr, owner_2, start + TILE, Q, SLICES, UNIT, BLOCK_B)
        if WHOLE_TILES:
            codes = tl.load(at + start)
        else:
            codes = tl.load(at + start, mask=(b < P)[:, None, :], other=0)
        k = (b // 16) * 32 + b % 16 if KIND == "int4" else b
        x, more = _inputs(x_ptr, norm_ptr, k, r, K, OFFSET, NORM, ONE, WHOLE_TILES, COMPUTE, BLOCK_R)
        square += more
        x_high = x
        if KIND == "int4":
            x_high, more = _inputs(x_ptr, norm_ptr, k + 16, r, K, OFFSET, NORM, ONE, WHOLE_TILES, COMPUTE, BLOCK_R)
            square += more
        if WHOLE:
            acc = _partial(acc, codes, x, x_high, zero, KIND, ZERO, COMPUTE, LOW, HIGH)
        else:
            sums = _partial(none, codes, x, x_high, zero, KIND, ZERO, COMPUTE, LOW, HIGH)
            acc += sums * scale.to(tl.float32)[:, :, None]
        if GATE != "":
            if WHOLE_TILES:
                codes = tl.load(at_2 + start)
            else:
                codes = tl.load(at_2 + start, mask=(b < P)[:, None, :], other=0)
            if WHOLE:
                acc_2 = _partial(acc_2, codes, x, x_high, zero_2, KIND, ZERO, COMPUTE, LOW, HIGH)
            else:
                sums = _partial(none, codes, x, x_high, zero_2, KIND, ZERO, COMPUTE, LOW, HIGH)
                acc_2 += sums * scale_2.to(tl.float32)[:, :, None]
        if not WHOLE:
            scale = later
            if GATE != "":
                scale_2 = later_2
            if ZERO:
                zero = later_zero
                if GATE != "":
                    zero_2 = later_zero_2
    out = tl.sum(acc, 0)  # [BLOCK_N, BLOCK_R]
    out_2 = out
    if GATE != "":
        out_2 = tl.sum(acc_2, 0)
    if WHOLE:
        out *= tl.load(scale_ptr + owner).to(tl.float32)[:, None]
        if GATE != "":
            out_2 *= tl.load(scale_ptr + owner_2).to(tl.float32)[:, None]
    if NORM:
        factor = 1 / tl.sqrt_rn(tl.sum(square) / K + eps)
        out *= factor
        out_2 *= factor
    if BIAS:
        out += tl.load(bias_ptr + bounded).to(tl.float32)[:, None]
        if GATE != "":
            out_2 += tl.load(bias_ptr + second).to(tl.float32)[:, None]
    if GATE != "":
        out = activate(out, GATE) * out_2
    column = tl.arange(0, BLOCK_R)
    place = column.to(tl.int64)[None, :] * N + n[:, None]
    live = (n < N)[:, None] & (column < rows)[None, :]
    if RESIDUAL:
        out += tl.load(residual_ptr + place, mask=live, other=0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=live)
