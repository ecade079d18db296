"""Decode on the GPU: pieces of the context and of the tails in one launch, their partial results combined in another."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.decode import DecodeSchedule, Pieces, Tail, decode_schedule
from kvzip.ops.quantize import Quantized

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

_TAIL_PIECE = 256  # rows of a tail that one program takes
_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Launch(NamedTuple):
    """Sizes of one launch: rows and keys of a tile, warps of a program, stages of its load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def launch_config(D: int, rows: int, dtype: torch.dtype, bits: int = 16) -> Launch:
    """The launch for `rows` query rows that share a head's context."""
    if dtype == torch.float32:
        return Launch(16, 32 if D <= 128 else 16, 4, 2)
    if rows <= 16:
        return Launch(16, 64 if D <= 128 else 32, 4, 3)
    if rows <= 32:
        return Launch(32, 64 if D <= 128 else 32, 4, 3)
    if rows <= 64:
        return Launch(64, 64 if D <= 128 else 32, 4, 3)
    return Launch(128, 64 if D <= 128 else 32, 8, 3)


def decode_triton(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "N D"] | Quantized,
    v: Float[Tensor, "N D"] | Quantized,
    offsets: Int32[Tensor, " H1"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    schedule: DecodeSchedule | None = None,
    tail: Tail | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """`decode` by two launches whose sizes follow from shapes and the schedule alone."""
    queries, query_heads, tokens, width = q.shape
    heads = len(offsets) - 1
    group = query_heads // heads
    rows = queries * tokens * group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    config = launch_config(width, rows, q.dtype, k.bits if isinstance(k, Quantized) else 16)
    return launch(config, q, k, v, offsets, scale, softcap, window, schedule, tail, out, lse)


def launch(config, q, k, v, offsets, scale, softcap, window, schedule, tail, out, lse, level=None, pdl=None):
    if q.dtype not in _TRITON_DTYPES:
        raise ValueError(f"expected q of float16, bfloat16 or float32, got {q.dtype}: KVZIP_BACKEND=reference takes it")
    queries, query_heads, tokens, width = q.shape
    heads = len(offsets) - 1
    group = query_heads // heads
    rows = queries * tokens * group
    schedule = decode_schedule(offsets) if schedule is None else schedule
    row_blocks = triton.cdiv(rows, config.block_m)
    pieces = choose_level(schedule, row_blocks) if level is None else schedule.levels[level]
    count = len(pieces.bounds)

    capacity = 0 if tail is None else tail[0].shape[2]
    splits = triton.cdiv(capacity, _TAIL_PIECE)
    tail_blocks = triton.cdiv(tokens * group, config.block_m)
    slots = count + heads * splits
    part = torch.empty((slots, rows, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((slots, rows), dtype=torch.float32, device=q.device)
    k_codes, k_scale, k_zero, bits, k_group = _parts(k)
    v_codes, v_scale, v_zero, _, _ = _parts(v)
    tail_k, tail_v, lengths = (k_codes, k_codes, offsets) if tail is None else tail
    for name, x in (("q", q), ("k", k_codes), ("v", v_codes), ("tail", tail_k), ("tail", tail_v)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"expected {name} with a contiguous last axis, got strides {x.stride()}: make it contiguous")
    interpreted = not q.is_cuda
    pdl = (not interpreted and torch.cuda.get_device_capability(q.device)[0] >= 9) if pdl is None else pdl
    programs = count * row_blocks + queries * heads * splits * tail_blocks
    compute = _TRITON_DTYPES[q.dtype]
    if interpreted and q.dtype == torch.bfloat16:
        compute = tl.float32  # the interpreter's dot is wrong for bfloat16
    if programs:
        _decode_kernel[(programs,)](
            q, k_codes, v_codes, k_scale, k_zero, v_scale, v_zero, offsets, pieces.bounds,
            tail_k, tail_v, lengths, part, part_lse,
            *q.stride()[:3], k_codes.stride(0), v_codes.stride(0), *_strides(tail_k), *_strides(tail_v),
            float(scale), float(softcap or 1.0), 0 if window is None else window,
            rows, tokens, heads, count, row_blocks, splits, tail_blocks, capacity,
            G=group, D=width, BITS=bits, GROUP=k_group, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SOFTCAP=softcap is not None, WINDOW=window is not None, TAIL=splits > 0, TAIL_PIECE=_TAIL_PIECE,
            COMPUTE=compute, PDL=pdl, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    extra = {"launch_pdl": True} if pdl else {}
    _combine_kernel[(rows, heads)](
        part, part_lse, pieces.first, out, lse, rows, tokens, heads, count, splits,
        G=group, D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_P=32, PDL=pdl, num_warps=4, **extra,
    )  # fmt: skip
    return out, lse


def choose_level(schedule: DecodeSchedule, row_blocks: int) -> Pieces:
    """The longest pieces that still make four programs per multiprocessor, or the shortest."""
    enough = [level for level in schedule.levels if len(level.bounds) * row_blocks >= 4 * schedule.processors]
    return enough[-1] if enough else schedule.levels[0]


def _parts(x):
    if isinstance(x, Quantized):
        return x.codes, x.scale.contiguous(), x.zero.contiguous(), x.bits, x.group
    return x, x, x, 16, x.shape[1]


def _strides(x):
    return x.stride()[:3] if x.ndim == 4 else (0, 0, 0)


@triton.jit
def _tanh(x):
    """tanh to float32 accuracy: an odd polynomial (Cephes) near 0, where 1 - e^-2x would cancel."""
    z = x * x
    near = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
            - 3.33332819422e-1) * z * x + x  # fmt: skip
    e = tl.exp2(-2 * LOG2_E * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _rows_of(ptr, rows, columns, stride, bound, MASKED: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Loads rows of W values, padded with zeros to BLOCK_W; MASKED: rows at and after bound are zeros too."""
    at = ptr + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        if W == BLOCK_W:
            return tl.load(at, mask=(rows < bound)[:, None], other=0)
        else:
            return tl.load(at, mask=(rows < bound)[:, None] & (columns < W)[None, :], other=0)
    else:
        if W == BLOCK_W:
            return tl.load(at)
        else:
            return tl.load(at, mask=(columns < W)[None, :], other=0)


@triton.jit
def _high(codes, BITS: tl.constexpr, COMPUTE: tl.constexpr):
    """Codes around zero, exact in any COMPUTE: code - 128 of 8 bits, or the high half's code - 8."""
    if BITS == 8:
        return (codes ^ 0x80).to(tl.int8, bitcast=True).to(COMPUTE)
    else:
        return ((codes >> 4).to(tl.int8, bitcast=True) - 8).to(COMPUTE)


@triton.jit
def _low(codes, COMPUTE: tl.constexpr):
    return ((codes & 15).to(tl.int8, bitcast=True) - 8).to(COMPUTE)


@triton.jit
def _step(
    acc, acc_odd, peak, total, q, q_odd, at, stop, low, high, unit, scale, softcap,
    k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
    D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    BANDED: tl.constexpr, COMPUTE: tl.constexpr, DEFER: tl.constexpr,
):  # fmt: skip
    """Folds keys at:at + BLOCK_N into the running softmax. MASKED: only those before stop; BANDED: low <= key < high."""
    n = tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    start = at.to(tl.int64)
    bound = stop - at
    k = _rows_of(k_ptr + start * stride_kn, n, w, stride_kn, bound, MASKED, W, BLOCK_W)  # [BLOCK_N, BLOCK_W]
    if BITS == 16:
        x = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    else:
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        half: tl.constexpr = 2 ** (BITS - 1)
        each: tl.constexpr = GROUP if BITS == 8 else GROUP // 2
        codes = tl.trans(_high(k, BITS, COMPUTE))
        for part in tl.static_range(D // GROUP):
            inside = (w // each == part)[None, :]
            q_part = tl.where(inside, q, 0)
            y = tl.dot(q_part, codes, input_precision="ieee")
            q_sum = tl.sum(q_part.to(tl.float32), 1)
            if BITS == 4:
                q_part = tl.where(inside, q_odd, 0)
                y = tl.dot(q_part, tl.trans(_low(k, COMPUTE)), y, input_precision="ieee")
                q_sum += tl.sum(q_part.to(tl.float32), 1)
            place = (start + n) * (D // GROUP) + part
            live = n < bound
            step = tl.load(k_scale_ptr + place, mask=live, other=0).to(tl.float32)
            zero = tl.load(k_zero_ptr + place, mask=live, other=0).to(tl.float32) + half * step
            x += y * step[None, :] + q_sum[:, None] * zero[None, :]
    if SOFTCAP:
        x = _tanh(x * (scale / softcap)) * (softcap * LOG2_E)
    if MASKED:
        x = tl.where((n < bound)[None, :], x, float("-inf"))
    if BANDED:
        key = at + n
        x = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), x, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(x, 1) * unit)
    if BANDED:
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        floor = new_peak
    p = tl.exp2(x * unit - floor[:, None])
    decay = tl.exp2(peak - floor)
    if DEFER:
        total = total * decay[:, None] + p
    else:
        total = total * decay + tl.sum(p, 1)
    v = _rows_of(v_ptr + start * stride_vn, n, w, stride_vn, bound, MASKED, W, BLOCK_W)
    acc = acc * decay[:, None]
    if BITS == 16:
        acc = tl.dot(p.to(COMPUTE), v.to(COMPUTE), acc, input_precision="ieee")
    else:
        if BITS == 4:
            acc_odd = acc_odd * decay[:, None]
        for part in tl.static_range(D // GROUP):
            place = (start + n) * (D // GROUP) + part
            live = n < bound
            step = tl.load(v_scale_ptr + place, mask=live, other=0).to(tl.float32)
            zero = tl.load(v_zero_ptr + place, mask=live, other=0).to(tl.float32) + half * step
            # Float16 cannot hold small weights times small steps: keep the steps of the tile near 1.
            largest = tl.maximum(tl.max(step, 0), 1e-30) if COMPUTE == tl.float16 else 1.0
            weight = (p * (step / largest)[None, :]).to(COMPUTE)
            offset = tl.sum(p * zero[None, :], 1)[:, None]
            inside = (w // each == part)[None, :]
            acc += tl.where(inside, tl.dot(weight, _high(v, BITS, COMPUTE), input_precision="ieee") * largest + offset, 0)
            if BITS == 4:
                odd = tl.dot(weight, _low(v, COMPUTE), input_precision="ieee") * largest + offset
                acc_odd += tl.where(inside, odd, 0)
    return acc, acc_odd, new_peak, total


@triton.jit
def _piece(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
    head, row, row_stop, slot, start, stop, low, high, rows, tokens,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, BANDED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Writes the attention of BLOCK_M rows over keys start:stop of one head to slot of the partial results."""
    W: tl.constexpr = D // 2 if BITS == 4 else D
    BLOCK_W: tl.constexpr = triton.next_power_of_2(W)
    DEFER: tl.constexpr = BLOCK_M == 16  # few rows: summing a tile's keys would go through shared memory
    w = tl.arange(0, BLOCK_W)
    m = row + tl.arange(0, BLOCK_M)
    live = (m < row_stop)[:, None] & (w < W)[None, :]
    b, t, g = (m // G // tokens).to(tl.int64), m // G % tokens, m % G
    q_row = q_ptr + b * stride_qb + (head * G + g).to(tl.int64) * stride_qh + t.to(tl.int64) * stride_qt
    if BITS == 4:
        q = tl.load(q_row[:, None] + 2 * w[None, :], mask=live, other=0).to(COMPUTE)
        q_odd = tl.load(q_row[:, None] + 2 * w[None, :] + 1, mask=live, other=0).to(COMPUTE)
        acc_odd = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    else:
        q = tl.load(q_row[:, None] + w[None, :], mask=live, other=0).to(COMPUTE)
        q_odd = 0.0
        acc_odd = 0.0
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if DEFER:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
    unit = 1.0 if SOFTCAP else scale * LOG2_E
    if BANDED:
        for at in range(start, stop, BLOCK_N):
            acc, acc_odd, peak, total = _step(
                acc, acc_odd, peak, total, q, q_odd, at, stop, low, high, unit, scale, softcap,
                k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
                D, W, BLOCK_W, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, True, True, COMPUTE, DEFER,
            )  # fmt: skip
    else:
        full = start + (stop - start) // BLOCK_N * BLOCK_N
        for at in range(start, full, BLOCK_N):
            acc, acc_odd, peak, total = _step(
                acc, acc_odd, peak, total, q, q_odd, at, stop, low, high, unit, scale, softcap,
                k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
                D, W, BLOCK_W, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, False, False, COMPUTE, DEFER,
            )  # fmt: skip
        if full < stop:
            acc, acc_odd, peak, total = _step(
                acc, acc_odd, peak, total, q, q_odd, full, stop, low, high, unit, scale, softcap,
                k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
                D, W, BLOCK_W, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, True, False, COMPUTE, DEFER,
            )  # fmt: skip
    if DEFER:
        mass = tl.sum(total, 1)
    else:
        mass = total
    mass_or_1 = tl.where(mass == 0, 1.0, mass)[:, None]
    place = slot.to(tl.int64) * rows + m
    tl.store(part_lse_ptr + place, peak + tl.log2(mass), mask=m < row_stop)
    if BITS == 4:
        tl.store(part_ptr + place[:, None] * D + 2 * w[None, :], acc / mass_or_1, mask=live)
        tl.store(part_ptr + place[:, None] * D + 2 * w[None, :] + 1, acc_odd / mass_or_1, mask=live)
    else:
        tl.store(part_ptr + place[:, None] * D + w[None, :], acc / mass_or_1, mask=live)


@triton.jit(do_not_specialize=["window", "rows", "heads", "count", "row_blocks", "splits", "tail_blocks", "capacity"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, offsets_ptr, bounds_ptr,
    tail_k_ptr, tail_v_ptr, lengths_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn,
    stride_tkb, stride_tkh, stride_tkr, stride_tvb, stride_tvh, stride_tvr,
    scale, softcap, window, rows, tokens, heads, count, row_blocks, splits, tail_blocks, capacity,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    TAIL: tl.constexpr, TAIL_PIECE: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows against one piece of the context (programs 0 to count * row_blocks) or of a tail."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < count * row_blocks:
        piece = program // row_blocks
        row = program % row_blocks * BLOCK_M
        head = tl.load(bounds_ptr + piece * 3)
        start = tl.load(bounds_ptr + piece * 3 + 1)
        stop = tl.load(bounds_ptr + piece * 3 + 2)
        low = tl.zeros([BLOCK_M], tl.int32)
        high = low
        if WINDOW:
            m = tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1)
            place = m // G % tokens - tokens  # T - 1 - t rows before the last one
            if TAIL:
                place += tl.load(lengths_ptr + m // G // tokens)
            else:
                place += 1
            here = tl.load(offsets_ptr + head + 1) + place
            low = here - window + 1
            high = here + 1
            start = tl.maximum(start, tl.min(low, 0))
            stop = tl.maximum(start, tl.minimum(stop, tl.max(high, 0)))
        _piece(
            q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, part_ptr, part_lse_ptr,
            stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
            head, row, rows, piece, start, stop, low, high, rows, tokens,
            G, D, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, WINDOW, COMPUTE,
        )  # fmt: skip
    elif TAIL:
        program -= count * row_blocks
        block = program % tail_blocks
        split = program // tail_blocks % splits
        head = program // tail_blocks // splits % heads
        question = program // tail_blocks // splits // heads
        length = tl.minimum(tl.load(lengths_ptr + question), capacity)
        row_stop = (question + 1) * tokens * G
        row = question * tokens * G + block * BLOCK_M
        m = tl.minimum(row + tl.arange(0, BLOCK_M), row_stop - 1)
        place = length - tokens + m // G % tokens
        low = place * 0
        if WINDOW:
            low = place - window + 1
        high = place + 1
        start = tl.maximum(split * TAIL_PIECE, tl.min(low, 0))
        stop = tl.minimum(split * TAIL_PIECE + TAIL_PIECE, tl.minimum(length, tl.max(high, 0)))
        slot = count + head * splits + split
        if start < stop:
            key_head = question.to(tl.int64)
            tail_k = tail_k_ptr + key_head * stride_tkb + head.to(tl.int64) * stride_tkh
            tail_v = tail_v_ptr + key_head * stride_tvb + head.to(tl.int64) * stride_tvh
            _piece(
                q_ptr, tail_k, tail_v, tail_k, tail_k, tail_k, tail_k, part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_tkr, stride_tvr, scale, softcap,
                head, row, row_stop, slot, start, stop, low, high, rows, tokens,
                G, D, 16, D, BLOCK_M, BLOCK_N, SOFTCAP, True, COMPUTE,
            )  # fmt: skip
        else:
            m = row + tl.arange(0, BLOCK_M)
            tl.store(part_lse_ptr + slot.to(tl.int64) * rows + m, float("-inf"), mask=m < row_stop)


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "count", "splits"])
def _combine_kernel(
    part_ptr, part_lse_ptr, first_ptr, out_ptr, lse_ptr, rows, tokens, heads, count, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one row of one head, its partial results weighted by their log-sum-exp."""
    row, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(first_ptr + head)
    pieces = tl.load(first_ptr + head + 1) - first
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for at in range(0, pieces + splits, BLOCK_P):
        i = at + tl.arange(0, BLOCK_P)
        slot = tl.where(i < pieces, first + i, count + head * splits + i - pieces)
        place = slot.to(tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + place, mask=i < pieces + splits, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(lse - floor)
        written = (lse != float("-inf"))[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=written, other=0)
        decay = tl.exp2(peak - floor)
        acc = acc * decay + tl.sum(weight[:, None] * part, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak
    b, t, g = row // G // tokens, row // G % tokens, row % G
    place = (b.to(tl.int64) * heads * G + head * G + g) * tokens + t
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + place * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + place, (peak + tl.log2(total)) * LN_2)


def merge_triton(
    a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """`merge` in one pass: reads a and b once, writes once."""
    width = a.shape[-1]
    out, lse = torch.empty(a.shape, dtype=a.dtype, device=a.device), torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    a, lse_a, b, lse_b = (x.contiguous() for x in (a, lse_a, b, lse_b))
    if out.numel():
        block = 16
        _merge_kernel[(triton.cdiv(lse.numel(), block),)](
            a, lse_a, b, lse_b, out, lse, lse.numel(),
            D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out, lse


@triton.jit
def _merge_kernel(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    lse_a = tl.load(lse_a_ptr + row, mask=row < rows, other=0)
    lse_b = tl.load(lse_b_ptr + row, mask=row < rows, other=0)
    peak = tl.maximum(lse_a, lse_b)
    floor = tl.where(peak == float("-inf"), 0.0, peak)
    weight_a, weight_b = tl.exp2((lse_a - floor) * LOG2_E), tl.exp2((lse_b - floor) * LOG2_E)
    total = weight_a + weight_b
    share = 1 / tl.where(total == 0, 1.0, total)
    at = row[:, None] * D + d[None, :]
    live = (row < rows)[:, None] & (d < D)[None, :]
    a = tl.load(a_ptr + at, mask=live, other=0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=live, other=0).to(tl.float32)
    out = a * (weight_a * share)[:, None] + b * (weight_b * share)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)
    tl.store(lse_ptr + row, peak + tl.log2(total) * LN_2, mask=row < rows)
