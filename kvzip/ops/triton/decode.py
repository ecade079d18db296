"""Decoding on the GPU: splits of context and tails in one launch, their partial results combined in another."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.schedule import decode_schedule
from kvzip.ops.triton.common import (
    LOG2_E,
    check_rows,
    compute_dtype,
    exp2,
    interpreted,
    launch_options,
    overlaps_launches,
    reserve,
    shared_memory,
)
from kvzip.ops.triton.decode_quantized import prefetch_rows, quantized_split
from kvzip.ops.triton.decode_rows import rows_split
from kvzip.ops.types import DecodeSchedule, Quantized, Splits, TailTensors

_TAIL_ROWS = 256  # rows of a tail in one split, for each block of query rows
# Integers that change from call to call: a kernel specialized to one of them would be compiled anew.
_VARYING = ["window", "rows", "heads", "count", "row_blocks", "tail_splits", "tail_blocks", "tail_rows", "capacity"]


class Launch(NamedTuple):
    """Sizes of one launch: query rows and keys of a tile, warps of a program, stages of its load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_sm: int = 2  # programs that run at once on an SM: 1, 2, 4 or 8
    early: bool = False  # start by programmatic dependent launch and prefetch the first rows to L2
    reserve: int = 0  # bytes of unused shared memory, which keep an SM to `per_sm` programs


def launch_config(D: int, rows: int, dtype: torch.dtype, bits: int = 16, *, hopper: bool = True) -> Launch:
    """The launch for `rows` query rows that share a head's context. Tuned on an H100, 2026-11-26: docs/tuning.md.

    GPUs before Hopper multiply from registers and get smaller tiles where registers would spill; not tuned there.
    """
    padded = triton.next_power_of_2(D) != D  # tiles are wider than rows
    if dtype == torch.float32:  # products in plain float32: no tensor cores
        half = padded and bits < 16 and not hopper  # eight warps would spill
        stages = 1 if D <= 64 and bits == 8 else 2  # two would spill
        return Launch(16 if D <= 128 else 8, 16, 4 if D <= 64 or half else 8, stages)  # larger tiles spill
    keys = 64 if D <= 128 else 32
    if bits < 16:
        if rows <= 8:
            few = (padded and bits == 8) or (D > 64 and not hopper and (padded or bits == 4))  # 64 keys would spill
            reserve = {8: 8 * 1024, 4: 25 * 1024}[bits] if D == 128 else 0  # keeps it at four programs on an SM
            # few rows: keys are the rows of products, and four programs on an SM hide the loads
            return Launch(8, 32 if few else keys, 2, 3, 4, early=bits == 8 or D == 128, reserve=reserve)
        if D <= 64 and bits == 4 and rows > 16 and hopper:
            return Launch(32, 64, 4, 3)  # 32 keys would spill with Triton 3.9
        return Launch(16 if rows <= 16 or D > 128 or not hopper else 32, 32, 4, 3)  # 32 rows would spill elsewhere
    if rows <= 16:
        if D == 128 and hopper:
            return Launch(16, keys, 4, 4, early=True)  # two programs with four stages fill an SM
        return Launch(16, keys if hopper or not padded else 32, 4, 3)  # 64 padded keys would spill before Hopper
    if rows <= 64:
        block = 32 if rows <= 32 else 64
        return Launch(block, keys, 4 if D <= 128 and (hopper or block == 32) else 8, 3)  # 4 warps would spill elsewhere
    return Launch(128, keys, 8, 3 if D <= 128 else 2, 1)  # many rows: products take the time, one program fills an SM


def decode_triton(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "N D"] | Quantized,
    v: Float[Tensor, "N D"] | Quantized,
    offsets: Int32[Tensor, " H1"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    bias: Float[Tensor, " N"] | None = None,
    schedule: DecodeSchedule | None = None,
    tail: TailTensors | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """`decode` by two launches whose sizes follow from shapes and the schedule alone.

    Reads each context byte from memory once for up to 128 query rows (questions x tokens x group; 32 if the context is
    quantized), more rows from L2: 2 N D values and 4 rows N D operations. Measured: docs/tuning.md.
    """
    if bias is not None:
        raise NotImplementedError("the kernel takes no bias yet")
    queries, query_heads, tokens, width = q.shape
    heads = len(offsets) - 1
    group = query_heads // heads
    rows = queries * tokens * group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    k_codes, k_scale, k_zero, bits, k_group = _parts(k)
    v_codes, v_scale, v_zero, v_bits, v_group = _parts(v)
    if (bits, k_group) != (v_bits, v_group):
        raise ValueError(f"expected k and v packed alike, got {bits} bits by {k_group} and {v_bits} bits by {v_group}")
    overlap = overlaps_launches(q)  # from Hopper on
    config = launch_config(width, rows, q.dtype, bits, hopper=overlap or interpreted())
    splits = choose_cut(decode_schedule(offsets) if schedule is None else schedule, config, rows)
    tail_k, tail_v, lengths = (q, q, offsets) if tail is None else tail
    channels = k.channels if isinstance(k, Quantized) else None
    center, spread = (k_scale, k_scale) if channels is None else (channels.center, channels.spread)
    check_rows(q=q, k=k_codes, v=v_codes, tail_k=tail_k, tail_v=tail_v)
    compute = compute_dtype(q)
    packed = bits < 16 and compute != tl.float32 and not interpreted()

    early = overlap and config.early
    count, row_blocks = len(splits.bounds), triton.cdiv(rows, config.block_m)
    capacity = 0 if tail is None else tail_k.shape[2]
    # Tail tiles have as many bytes as context tiles; products of 16-bit rows need at least 16 query rows.
    tail_m = config.block_m if compute == tl.float32 else max(config.block_m, 16)
    tail_n = max(config.block_n * bits // 16, 16)
    tail_blocks = triton.cdiv(tokens * group, tail_m)
    tail_rows = _TAIL_ROWS * tail_blocks
    tail_splits = triton.cdiv(capacity, tail_rows)
    slots = count + heads * tail_splits
    part = torch.empty((slots, rows, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((slots, rows), dtype=torch.float32, device=q.device)
    programs = count * row_blocks + queries * heads * tail_splits * tail_blocks
    if programs:
        _decode_kernel[(programs,)](
            q, k_codes, v_codes, k_scale, k_zero, v_scale, v_zero, center, spread, offsets, splits.bounds,
            tail_k, tail_v, lengths, part, part_lse,
            *q.stride()[:3], k_codes.stride(0), v_codes.stride(0), *tail_k.stride()[:3], *tail_v.stride()[:3],
            float(scale), float(softcap or 1.0), 0 if window is None else window,
            rows, tokens, heads, count, row_blocks, tail_splits, tail_blocks, tail_rows, capacity,
            G=group, D=width, BITS=bits, GROUP=k_group, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            TAIL_M=tail_m, TAIL_N=tail_n, SOFTCAP=softcap is not None, WINDOW=window is not None,
            TAIL=tail_splits > 0 or window is None,  # matters with a window only; else one variant to compile
            COMPUTE=compute, CODE_COMPUTE=tl.float16 if packed else compute, PACKED=packed, OVERLAP=overlap,
            CHANNELS=channels is not None, EARLY=early, SHORT=len(k_codes) < config.block_n,
            RESERVED=shared_memory(config.reserve if early else 0),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True, **launch_options(early),
        )  # fmt: skip
    # One loop step combines all partial results of a row, unless heads are very unequal.
    block_p = min(max(16, triton.next_power_of_2(2 * (count // heads + tail_splits))), 128)
    block_d = min(32, triton.next_power_of_2(width))
    _combine_kernel[(rows, heads, triton.cdiv(width, block_d))](
        part, part_lse, splits.first, out, lse, q, center, *q.stride()[:3], float(scale),
        rows, tokens, heads, count, tail_splits,
        G=group, D=width, BLOCK_D=block_d, BLOCK_P=block_p, CENTERED=channels is not None and softcap is None,
        OVERLAP=overlap and programs > 0, EARLY=early, num_warps=4, enable_fp_fusion=True,
        **launch_options(overlap and programs > 0),
    )  # fmt: skip
    return out, lse


def choose_cut(schedule: DecodeSchedule, config: Launch, rows: int) -> Splits:
    """The longest splits that still make enough programs: four per SM, or twice as many as run at once if that is more.

    If none do, the shortest splits that `config.per_sm` allows. `DecodeSchedule.cuts` begins with eight splits per SM,
    and each cut after it has half as many.
    """
    cuts = schedule.cuts[4 - config.per_sm.bit_length() :]
    programs = max(4, 2 * config.per_sm) * schedule.sms
    enough = [cut for cut in cuts if len(cut.bounds) * triton.cdiv(rows, config.block_m) >= programs]
    return enough[-1] if enough else cuts[0]


def _parts(x: Tensor | Quantized) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Data, scales, zeros, bits and group of a context; codes as 16-bit words, which matrix loads can transpose."""
    if not isinstance(x, Quantized):
        return x, x, x, 16, x.shape[1]
    if x.group * x.bits % 16:
        raise ValueError(
            f"expected groups of whole 16-bit words, got {x.group} values of {x.bits} bits: quantize again"
        )
    return x.codes.view(torch.int16), x.scale.contiguous(), x.zero.contiguous(), x.bits, x.group


@triton.jit(do_not_specialize=_VARYING)
@no_type_check
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, center_ptr, spread_ptr,
    offsets_ptr, bounds_ptr,
    tail_k_ptr, tail_v_ptr, lengths_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn,
    stride_tkb, stride_tkh, stride_tkr, stride_tvb, stride_tvh, stride_tvr,
    scale, softcap, window, rows, tokens, heads, count, row_blocks, tail_splits, tail_blocks, tail_rows, capacity,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr, TAIL_N: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TAIL: tl.constexpr, COMPUTE: tl.constexpr,
    CODE_COMPUTE: tl.constexpr, PACKED: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
    SHORT: tl.constexpr, CHANNELS: tl.constexpr, RESERVED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows against one split of the context (programs 0 to count * row_blocks) or of a tail."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    reserve(RESERVED)
    program = tl.program_id(0)
    if program < count * row_blocks:
        split = program // row_blocks
        row = program % row_blocks * BLOCK_M
        head = tl.load(bounds_ptr + split * 3)
        begin = tl.load(bounds_ptr + split * 3 + 1)
        stop = tl.load(bounds_ptr + split * 3 + 2)
        if EARLY:
            TWO_TILES: tl.constexpr = triton.next_power_of_2(2 * BLOCK_N * D * BITS // 8)
            prefetch_rows(k_ptr, begin, stop, stride_kn, TWO_TILES)
            prefetch_rows(v_ptr, begin, stop, stride_vn, TWO_TILES)
            tl.extra.cuda.gdc_wait()
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
            begin = tl.maximum(begin, tl.min(low, 0))
            stop = tl.maximum(begin, tl.minimum(stop, tl.max(high, 0)))
        if BITS == 16:
            rows_split(
                q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
                head, row, rows, split, begin, stop, low, high, rows, tokens,
                G, D, BLOCK_M, BLOCK_N, SOFTCAP, WINDOW, COMPUTE,
            )  # fmt: skip
        else:
            quantized_split(
                q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, center_ptr, spread_ptr,
                part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
                head, row, rows, split, begin, stop, low, high, rows, tokens,
                G, D, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, WINDOW, CODE_COMPUTE, PACKED, SHORT, CHANNELS,
            )  # fmt: skip
    else:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        program -= count * row_blocks
        block = program % tail_blocks
        split = program // tail_blocks % tail_splits
        head = program // tail_blocks // tail_splits % heads
        question = program // tail_blocks // tail_splits // heads
        length = tl.minimum(tl.load(lengths_ptr + question), capacity)
        row_stop = (question + 1) * tokens * G
        row = question * tokens * G + block * TAIL_M
        r = tl.minimum(row + tl.arange(0, TAIL_M), row_stop - 1)
        position = length - tokens + r // G % tokens
        first = position - window + 1 if WINDOW else position * 0
        after = position + 1
        begin = tl.maximum(split * tail_rows, tl.min(first, 0))
        stop = tl.minimum(split * tail_rows + tail_rows, tl.minimum(length, tl.max(after, 0)))
        slot = count + head * tail_splits + split
        if begin < stop:
            key_head = question.to(tl.int64)
            tail_k = tail_k_ptr + key_head * stride_tkb + head.to(tl.int64) * stride_tkh
            tail_v = tail_v_ptr + key_head * stride_tvb + head.to(tl.int64) * stride_tvh
            rows_split(
                q_ptr, tail_k, tail_v, part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_tkr, stride_tvr, scale, softcap,
                head, row, row_stop, slot, begin, stop, first, after, rows, tokens,
                G, D, TAIL_M, TAIL_N, SOFTCAP, True, COMPUTE,
            )  # fmt: skip
        else:
            r = row + tl.arange(0, TAIL_M)
            tl.store(part_lse_ptr + slot.to(tl.int64) * rows + r, float("-inf"), mask=r < row_stop)


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "count", "tail_splits"])
@no_type_check
def _combine_kernel(
    part_ptr, part_lse_ptr, first_ptr, out_ptr, lse_ptr, q_ptr, center_ptr, stride_qb, stride_qh, stride_qt, scale,
    rows, tokens, heads, count, tail_splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, CENTERED: tl.constexpr,
    OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one row of one head, its partial results weighted by their log-sum-exp.

    CENTERED: scale * q . center is added here to the log-sum-exp of the context's parts.
    """
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    row, head = tl.program_id(0), tl.program_id(1)
    b, t, g = row // G // tokens, row // G % tokens, row % G
    first = tl.load(first_ptr + head)
    context_splits = tl.load(first_ptr + head + 1) - first
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    c = tl.arange(0, triton.next_power_of_2(D))
    if CENTERED:
        center = tl.load(center_ptr + head * D + c, mask=c < D, other=0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    shift = 0.0
    if CENTERED:
        q_row = q_ptr + b.to(tl.int64) * stride_qb + (head * G + g).to(tl.int64) * stride_qh
        q = tl.load(q_row + t.to(tl.int64) * stride_qt + c, mask=c < D, other=0)
        shift = tl.sum(q.to(tl.float32) * center, 0) * scale
    for at in range(0, context_splits + tail_splits, BLOCK_P):
        i = at + tl.arange(0, BLOCK_P)
        slot = tl.where(i < context_splits, first + i, count + head * tail_splits + i - context_splits)
        place = slot.to(tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + place, mask=i < context_splits + tail_splits, other=float("-inf"))
        if CENTERED:
            lse += tl.where(i < context_splits, shift, 0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = exp2((lse - floor) * LOG2_E, EXACT)
        live = (i < context_splits + tail_splits)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=live, other=0)
        part = tl.where((lse != float("-inf"))[:, None], part, 0)  # a split without visible keys leaves it unset
        decay = exp2((peak - floor) * LOG2_E, EXACT)
        acc = acc * decay + tl.sum(weight[:, None] * part, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak
    place = (b.to(tl.int64) * heads * G + head * G + g) * tokens + t
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + place * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + place, peak + tl.log(total), mask=tl.program_id(2) == 0)
