"""Turns and quantizes rows in one launch, and measures the channels of heads in another. Neither waits for the device.

A tile of rows of one head is turned some columns at a time by products with signs that are computed, not loaded, and
then by sums and differences of these. What bfloat16 loses of a row is multiplied too, so that products are exact to
2 ** -16. All columns of the tile stay in registers. Bytes: x read and the quantized rows written once, and with
feedback D * D numbers a tile out of L1. What limits is not bytes but instructions: there is no division of a value, and
none is converted to a whole number (these run at an eighth of the rate); a tie may be rounded down.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from kvzip.ops.triton.common import check_rows, interpreted, on_device
from kvzip.ops.triton.steps import ROUND, grid, reciprocal, rounded
from kvzip.ops.triton.turn import mix_blocks, signs
from kvzip.ops.turning import FIRST_PART, LEAST_PART, SAMPLE
from kvzip.ops.types import FINE, LIMIT, NARROW, SHAPED, Channels, Quantized, group_of


def launch_config(D: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows of a tile, columns that are turned at a time, and warps: 64 registers of a thread hold a tile. Not tuned."""
    columns = 16 if D <= 128 else 32  # more columns: fewer products, each a part of the kernel
    if dtype == torch.float32:  # no tensor cores
        return 16, columns, 8 if D <= 128 else 16
    return 64 if D <= 128 else 16, columns, 4 if D <= 128 else 8


def channels_config(block_d: int) -> tuple[int, int]:
    """Rows of a head's sample that are loaded at once, and warps: few heads are few programs, which wait for loads."""
    return min(SAMPLE, 32768 // block_d), 16


@on_device
def quantize_turned_triton(
    x: Float[Tensor, "N D"],
    *,
    bits: int,
    group: int | None = None,
    offsets: Int32[Tensor, " H1"] | None = None,
    channels: Channels | None = None,
    feedback: Float32[Tensor, "H D D"] | None = None,
    wide: bool = False,
) -> tuple[Quantized, Int32[Tensor, "2"]]:
    N, D = x.shape
    group = group_of(D) if group is None else group
    check_rows(x=x)
    _check(x, group)
    if offsets is not None and channels is None:
        channels = measure_channels_turned_triton(x, offsets, bits=bits, group=group)
    dtype = torch.float32 if wide else torch.float16
    codes = torch.empty(N, D * bits // 8, dtype=torch.uint8, device=x.device)
    scale, zero = torch.empty(2, N, D // group, dtype=dtype, device=x.device)
    flags = torch.zeros(2, dtype=torch.int32, device=x.device)
    block_n, columns, warps = launch_config(D, x.dtype)
    heads = 0 if offsets is None else len(offsets) - 1
    center, each = (x, x) if channels is None else (channels.center, channels.spread.reciprocal())
    if N:
        _quantize_turned_kernel[(triton.cdiv(N, block_n) + heads,)](
            x, codes, scale, zero, flags, x if offsets is None else offsets, center, each,
            x if feedback is None else feedback.contiguous(), N, heads, *x.stride(),
            D=D, GROUP=group, BITS=bits, KEYS=offsets is not None, FEEDBACK=feedback is not None,
            NARROW=NARROW if bits == 2 and offsets is None else 1.0, FINE=FINE, LIMIT=LIMIT,
            MOST=torch.finfo(dtype).max, SHAPED=SHAPED, C=columns, BLOCK_N=block_n, TURN=_turning(x),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return Quantized(codes, scale, zero, bits, group, channels, turned=True), flags


@on_device
def measure_channels_turned_triton(
    x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"], *, bits: int, group: int | None = None
) -> Channels:
    heads, D = len(offsets) - 1, x.shape[1]
    group = group_of(D) if group is None else group
    check_rows(x=x)
    _check(x, group)
    center, spread = torch.empty(2, heads, D, dtype=torch.float32, device=x.device)
    block_d = max(16, triton.next_power_of_2(D))
    rows, warps = channels_config(block_d)
    _channels_kernel[(heads,)](
        x, offsets, center, spread, *x.stride(),
        D=D, GROUP=group, BITS=bits, LIMIT=LIMIT, MOST=torch.finfo(torch.float16).max, SAMPLE=SAMPLE,
        LEAST_PART=LEAST_PART, FIRST_PART=FIRST_PART, C=launch_config(D, x.dtype)[1], BLOCK_N=rows,
        BLOCK_D=block_d, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return Channels(center, spread)


def _turning(x: Tensor) -> tl.dtype:
    return tl.float32 if x.dtype == torch.float32 or interpreted() else tl.bfloat16


def _check(x: Tensor, group: int) -> None:
    D, columns = x.shape[1], launch_config(x.shape[1], x.dtype)[1]
    if group != D and group % columns:
        raise ValueError(f"expected a group of a multiple of {columns} values, got {group} of D={D}: pass group=D")


@triton.jit
@no_type_check
def _quantize_turned_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, flags_ptr, offsets_ptr, center_ptr, each_ptr, feedback_ptr,
    N, heads, stride_xn, stride_xd,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, FEEDBACK: tl.constexpr,
    NARROW: tl.constexpr, FINE: tl.constexpr, LIMIT: tl.constexpr, MOST: tl.constexpr, SHAPED: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows, with KEYS of one head; it has none where heads fill fewer tiles than there are."""
    tile = tl.program_id(0)
    head, first, stop = tile * 0, tile * BLOCK_N, tile * 0 + N
    if KEYS:
        stop = first
        for h in range(heads):
            begin, end = tl.load(offsets_ptr + h), tl.load(offsets_ptr + h + 1)
            here = (tile >= 0) & (tile < tl.cdiv(end - begin, BLOCK_N))
            head = tl.where(here, h, head)
            first = tl.where(here, begin + tile * BLOCK_N, first)
            stop = tl.where(here, end, stop)
            tile -= tl.cdiv(end - begin, BLOCK_N)
    if first < stop:
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        live = n < stop
        c = tl.arange(0, C)
        xs = ()
        most = tl.zeros([BLOCK_N, C], tl.float32)
        for j in tl.static_range((D + C - 1) // C):
            d = j * C + c
            inside = live[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + n[:, None] * stride_xn + d[None, :] * stride_xd, mask=inside, other=0).to(tl.float32)
            most = tl.maximum(most, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
            x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
            if KEYS:
                center = tl.load(center_ptr + head * D + d, mask=d < D, other=0)
                each = tl.load(each_ptr + head * D + d, mask=d < D, other=0)
                x = tl.where(inside, (x - center[None, :]) * each[None, :], 0)
            xs += (x,)
        if tl.max((most < float("inf")).to(tl.int32) ^ 1) > 0:  # false for NaN
            tl.store(flags_ptr, 1)
        EXACT: tl.constexpr = not KEYS and x_ptr.dtype.element_ty == TURN
        turned = _turn(xs, D, KEYS, MOST, EXACT, C, TURN)
        zeros, scales, coarse = grid(
            turned, D, GROUP, BITS, NARROW, FINE if KEYS else 0.0, C, zero_ptr.dtype.element_ty
        )
        if tl.max((coarse & live).to(tl.int32)) > 0:
            tl.store(flags_ptr + 1, 1)
        for g in tl.static_range(D // GROUP):
            tl.store(zero_ptr + n * (D // GROUP) + g, zeros[g], mask=live)
            tl.store(scale_ptr + n * (D // GROUP) + g, scales[g], mask=live)
        eachs = ()
        for g in tl.static_range(D // GROUP):
            eachs += (reciprocal(scales[g].to(tl.float32)),)
        bytes = tl.arange(0, C * BITS // 8)
        errors = ()
        for j in tl.static_range((D + C - 1) // C):
            zero = zeros[j * C // GROUP].to(tl.float32)[:, None]
            scale = scales[j * C // GROUP].to(tl.float32)[:, None]
            each = eachs[j * C // GROUP][:, None]
            target = turned[j]
            if FEEDBACK:
                at = feedback_ptr + head.to(tl.int64) * (D * D) + c[:, None] * D + (j * C + c)[None, :]
                mores = ()  # all are on their way before the first is used
                for i in tl.static_range(j + 1):
                    seen = (i * C + c < D)[:, None] & (j * C + c < D)[None, :]
                    mores += (tl.load(at + i * C * D, mask=seen, other=0),)
                for i in tl.static_range(j):
                    target += tl.dot(errors[i], mores[i].to(TURN), input_precision="ieee")
                for s in tl.static_range(C // SHAPED - 1):  # blocks of SHAPED of these columns, for those after them
                    error = (rounded(target, zero, each, BITS) - ROUND) * scale + zero - target
                    error = tl.where((c // SHAPED == s)[None, :], error, 0).to(TURN)
                    target += tl.dot(error, mores[j].to(TURN), input_precision="ieee")
            found = rounded(target, zero, each, BITS)
            if FEEDBACK:
                errors += (((found - ROUND) * scale + zero - target).to(TURN),)
            packed = found.to(tl.int32, bitcast=True)  # its lowest byte is the code
            if BITS == 2:
                high, low = tl.split(tl.reshape(packed, [BLOCK_N, C // 2, 2]))
                packed = (high << 2) | low
            high, low = tl.split(tl.reshape(packed, [BLOCK_N, C * BITS // 8, 2]))
            packed = ((high << 4) | low).to(tl.uint8)
            to = codes_ptr + n[:, None] * (D * BITS // 8) + (j * C * BITS // 8 + bytes)[None, :]
            tl.store(to, packed, mask=live[:, None] & (j * C * BITS // 8 + bytes < D * BITS // 8)[None, :])


@triton.jit
@no_type_check
def _channels_kernel(
    x_ptr, offsets_ptr, center_ptr, spread_ptr, stride_xn, stride_xd,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, LIMIT: tl.constexpr, MOST: tl.constexpr,
    SAMPLE: tl.constexpr, LEAST_PART: tl.constexpr, FIRST_PART: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a head. `measure_roots`, and then what the first row loses moves the center."""
    head = tl.program_id(0)
    begin = tl.load(offsets_ptr + head).to(tl.int64)
    count = tl.load(offsets_ptr + head + 1) - begin
    others = tl.maximum(count - 1, 1)
    start = begin + tl.where(count > 1, 1, 0)
    d = tl.arange(0, BLOCK_D)
    seen = (d < D) & (d * 0 + count > 0)
    at = x_ptr + d[None, :] * stride_xd
    center = tl.zeros([BLOCK_D], tl.float32)
    for s in range(0, SAMPLE, BLOCK_N):
        n = start + (s + tl.arange(0, BLOCK_N)) * others // SAMPLE
        center += tl.sum(tl.load(at + n[:, None] * stride_xn, mask=seen[None, :], other=0).to(tl.float32), 0)
    center = center * (1.0 / SAMPLE)
    most = tl.full([BLOCK_D], 2.0**-60, tl.float32)
    for s in range(0, SAMPLE, BLOCK_N):
        n = start + (s + tl.arange(0, BLOCK_N)) * others // SAMPLE
        x = tl.load(at + n[:, None] * stride_xn, mask=seen[None, :], other=0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(x - center[None, :]), 0))
    squares = tl.zeros([BLOCK_D], tl.float32)
    for s in range(0, SAMPLE, BLOCK_N):
        n = start + (s + tl.arange(0, BLOCK_N)) * others // SAMPLE
        x = tl.load(at + n[:, None] * stride_xn, mask=seen[None, :], other=0).to(tl.float32)
        x = (x - center[None, :]) / most[None, :]
        squares += tl.sum(x * x, 0)
    first = tl.load(x_ptr + begin * stride_xn + d * stride_xd, mask=seen, other=0).to(tl.float32)
    deviation = tl.maximum(most * tl.sqrt(squares * (1.0 / SAMPLE)), FIRST_PART * tl.abs(first - center))
    deviation = tl.where(d < D, deviation, 0)
    mean = tl.sum(deviation, 0) / D
    spread = tl.sqrt(tl.maximum(deviation, LEAST_PART * mean)) * tl.sqrt(mean)
    usable = (d * 0 + count > 1) & (spread > 0) & (spread < float("inf"))
    spread = tl.where(usable, spread, 1.0)
    center = tl.where(seen & (tl.abs(center) < float("inf")), center, 0.0)
    tl.store(spread_ptr + head * D + d, spread, mask=d < D)
    tl.store(center_ptr + head * D + d, center, mask=d < D)
    tl.debug_barrier()  # they are read by other threads now

    c = tl.arange(0, C)
    SMALL: tl.constexpr = (D & -D) if (D & -D) < C else C
    small = signs(c[:, None], c[None, :], SMALL, tl.float32)
    blocks = ()
    for j in tl.static_range((D + C - 1) // C):
        d = j * C + c
        seen = (d < D) & (d * 0 + count > 0)
        x = tl.load(x_ptr + begin * stride_xn + d * stride_xd, mask=seen, other=0).to(tl.float32)
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT) - tl.load(center_ptr + head * D + d, mask=seen, other=0)
        x = tl.div_rn(x, tl.load(spread_ptr + head * D + d, mask=seen, other=1))
        blocks += (tl.sum(tl.where(seen, x, 0)[:, None] * small, 0),)
    mixed = mix_blocks(blocks, D, C)
    turned = ()
    for j in tl.static_range((D + C - 1) // C):
        turned += (tl.minimum(tl.maximum(mixed[j], -MOST), MOST)[None, :],)
    zeros, scales, _ = grid(turned, D, GROUP, BITS, 1.0, 0.0, C, tl.float16)
    blocks = ()
    for j in tl.static_range((D + C - 1) // C):
        zero, scale = zeros[j * C // GROUP].to(tl.float32)[:, None], scales[j * C // GROUP].to(tl.float32)[:, None]
        codes = rounded(turned[j], zero, reciprocal(scale), BITS) - ROUND
        lost = tl.sum(turned[j] - (codes * scale + zero), 0)
        blocks += (tl.sum(tl.where(j * C + c < D, lost, 0)[:, None] * small, 0),)
    mixed = mix_blocks(blocks, D, C)
    for j in tl.static_range((D + C - 1) // C):
        at_block = head * D + j * C + c
        seen = j * C + c < D
        moved = mixed[j] * tl.load(spread_ptr + at_block, mask=seen, other=0)
        moved = tl.where((c * 0 + count > 0) & (tl.abs(moved) < float("inf")), moved, 0)
        tl.store(center_ptr + at_block, tl.load(center_ptr + at_block, mask=seen, other=0) + moved, mask=seen)


@triton.jit
@no_type_check
def _turn(
    xs, D: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """Rows in tiles of C columns turned, which are EXACT if TURN has their values; with KEYS clipped to MOST."""
    c = tl.arange(0, C)
    SMALL: tl.constexpr = (D & -D) if (D & -D) < C else C
    matrix = signs(c[:, None], c[None, :], SMALL, TURN)
    blocks = ()
    for j in tl.static_range((D + C - 1) // C):
        high = xs[j]
        if TURN != tl.float32 and not EXACT:  # noqa: SIM300 a constexpr on the right is no tuple's item
            high = (high.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)  # what bfloat16 has of it
        y = tl.dot(high.to(TURN), matrix, input_precision="ieee")
        if TURN != tl.float32 and not EXACT:  # noqa: SIM300
            y = tl.dot((xs[j] - high).to(TURN), matrix, y)
        blocks += (y,)
    turned = mix_blocks(blocks, D, C)
    if KEYS:
        clipped = ()
        for j in tl.static_range((D + C - 1) // C):
            clipped += (tl.minimum(tl.maximum(turned[j], -MOST), MOST),)
        turned = clipped
    return turned
