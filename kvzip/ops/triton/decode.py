"""Decode on the GPU: pieces of context and tails in one launch, their partial results combined in another."""

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
from kvzip.ops.triton.decode_codes import codes_piece, prefetch_rows
from kvzip.ops.triton.decode_rows import rows_piece
from kvzip.ops.types import DecodeSchedule, Quantized, Splits, TailTensors

_TAIL_PIECE = 256  # rows of a tail that a program takes, times the programs that share them


class Launch(NamedTuple):
    """Sizes of one launch: rows and keys of a tile, warps of a program, stages of its load pipeline, programs."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    pieces: int = 2  # programs that run at once on a processor: 1, 2, 4 or 8
    early: bool = False  # whether programs ask for their first rows while the kernel in front still runs
    reserve: int = 0  # bytes of shared memory beyond what tiles take, so that no more programs run at once


def launch_config(D: int, rows: int, dtype: torch.dtype, bits: int = 16, *, hopper: bool = True) -> Launch:
    """The launch for `rows` query rows that share a head's context. Tuned on an H100, 2026-11-26.

    Chips before it multiply from registers and get smaller tiles where these would not hold them; not tuned there.
    """
    padded = triton.next_power_of_2(D) != D  # tiles are wider than rows
    if dtype == torch.float32:  # products in plain float32: no tensor cores
        half = padded and bits < 16 and not hopper  # eight warps would spill
        stages = 1 if D <= 64 and bits == 8 else 2  # two would spill
        return Launch(16 if D <= 128 else 8, 16, 4 if D <= 64 or half else 8, stages)
    keys = 64 if D <= 128 else 32
    if bits < 16:
        if rows <= 8:
            few = (padded and bits == 8) or (D > 64 and not hopper and (padded or bits == 4))  # 64 keys would spill
            reserve = {8: 8 * 1024, 4: 25 * 1024}[bits] if D == 128 else 0
            return Launch(8, 32 if few else keys, 2, 3, 4, early=bits == 8 or D == 128, reserve=reserve)
        if D <= 64 and bits == 4 and rows > 16 and hopper:
            return Launch(32, 64, 4, 3)  # 32 keys take 4% less time, and spill with Triton 3.9
        return Launch(16 if rows <= 16 or D > 128 or not hopper else 32, 32, 4, 3)
    if rows <= 16:
        if D == 128 and hopper:
            return Launch(16, keys, 4, 4, early=True)
        return Launch(16, keys if hopper or not padded else 32, 4, 3)
    if rows <= 64:
        block = 32 if rows <= 32 else 64
        return Launch(block, keys, 4 if D <= 128 and (hopper or block == 32) else 8, 3)
    return Launch(128, keys, 8, 3 if D <= 128 else 2, 1)


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
    tail: TailTensors | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """`decode` by two launches whose sizes follow from shapes and the schedule alone.

    Reads each context byte once for up to 128 rows (questions x tokens x group; codes: 32, the rest from L2): 2 N D
    values, 161 MB at 0.3 of 131,072 (8 heads, D 128), 52.5 us at the 3.07 TB/s of an H100; 4 rows N D operations.
    Measured there (2026-11-26, bf16, cold, in a CUDA graph, benchmarks/results/ops.jsonl): 61.1 us, and 19.8 us at 0.3
    of 32,768; one head with half of the rows 63.7, even heads 60.9; 32 questions 74.8; D=256 114.8 (2.8 TB/s). With 512
    new tokens 441 TFLOP/s by the same kernel with 128 rows a program. At both lengths that is 7 to 9 us more than the
    bytes take; what they go to was not measured.

    Tried, in us at 131,072 unless said: three to eight pieces per processor 66 to 80 (starting a program costs more
    than balance gains); tiles of 128 keys 69, pipelines of two stages 64; combining without overlapped launches 62.3;
    32 partial results at a time instead of all 63.6 (23.2 instead of 20.2 at 32,768); combining all columns in one
    program 66.4 instead of 64.2. Starting before the kernel in front has ended takes 62.0 instead of 60.9, and 21.6
    instead of 20.6 at 32,768, where three programs fit on a processor and settle unevenly. With four stages, which two
    fit of, it takes 61.1 and 19.8, and a step of an 8B shape 7.09 ms for 7.21 and 5.82 for 5.91. Pieces of whole tiles
    60.5 instead of 61.3; tails before pieces 63.8 instead of 61.8 (with a tail); asking for the next kernel's start at
    the end of a program 61.5 instead of 60.9.
    """
    rows = q[:, 0, :, 0].numel() * (q.shape[1] // (len(offsets) - 1))
    overlap = overlaps_launches(q)  # as Hopper does, and nothing before it
    bits = k.bits if isinstance(k, Quantized) else 16
    config = launch_config(q.shape[3], rows, q.dtype, bits, hopper=overlap or interpreted())
    schedule = decode_schedule(offsets) if schedule is None else schedule
    pieces = choose_level(schedule, config, rows)
    return launch(q, k, v, offsets, scale, softcap, window, pieces, tail, config, overlap)


def choose_level(schedule: DecodeSchedule, config: Launch, rows: int) -> Splits:
    """The longest pieces that still make four programs per processor; else as many as run at once.

    `DecodeSchedule` has the levels: eight pieces per processor first, then half as many each.
    """
    levels = schedule.cuts[4 - config.pieces.bit_length() :]
    programs = max(4, 2 * config.pieces) * schedule.sms
    enough = [level for level in levels if len(level.bounds) * triton.cdiv(rows, config.block_m) >= programs]
    return enough[-1] if enough else levels[0]


def launch(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    offsets: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    pieces: Splits,
    tail: TailTensors | None,
    config: Launch,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    """`decode` with everything chosen: what benchmarks vary."""
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
    tail_k, tail_v, lengths = (q, q, offsets) if tail is None else tail
    channels = k.channels if isinstance(k, Quantized) else None
    center, spread = (k_scale, k_scale) if channels is None else (channels.center, channels.spread)
    check_rows(q=q, k=k_codes, v=v_codes, tail_k=tail_k, tail_v=tail_v)
    compute = compute_dtype(q)
    packed = bits < 16 and compute != tl.float32 and not interpreted()

    early = overlap and config.early
    count, row_blocks = len(pieces.bounds), triton.cdiv(rows, config.block_m)
    capacity = 0 if tail is None else tail_k.shape[2]
    # A tile of a tail has as many bytes as one of the context, and the products of 16-bit rows at least 16 rows.
    tail_m = config.block_m if compute == tl.float32 else max(config.block_m, 16)
    tail_n = max(config.block_n * bits // 16, 16)
    tail_blocks = triton.cdiv(tokens * group, tail_m)
    tail_piece = _TAIL_PIECE * tail_blocks
    splits = triton.cdiv(capacity, tail_piece)
    slots = count + heads * splits
    part = torch.empty((slots, rows, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((slots, rows), dtype=torch.float32, device=q.device)
    programs = count * row_blocks + queries * heads * splits * tail_blocks
    if programs:
        _decode_kernel[(programs,)](
            q, k_codes, v_codes, k_scale, k_zero, v_scale, v_zero, center, spread, offsets, pieces.bounds,
            tail_k, tail_v, lengths, part, part_lse,
            *q.stride()[:3], k_codes.stride(0), v_codes.stride(0), *tail_k.stride()[:3], *tail_v.stride()[:3],
            float(scale), float(softcap or 1.0), 0 if window is None else window,
            rows, tokens, heads, count, row_blocks, splits, tail_blocks, tail_piece, capacity,
            G=group, D=width, BITS=bits, GROUP=k_group, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            TAIL_M=tail_m, TAIL_N=tail_n, SOFTCAP=softcap is not None, WINDOW=window is not None,
            TAIL=splits > 0 or window is None,  # only a window asks
            COMPUTE=compute, CODE_COMPUTE=tl.float16 if packed else compute, PACKED=packed, OVERLAP=overlap,
            CHANNELS=channels is not None, EARLY=early, SHORT=len(k_codes) < config.block_n,
            RESERVED=shared_memory(config.reserve if early else 0),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True, **launch_options(early),
        )  # fmt: skip
    # As a rule one step of the loop takes all the partial results of a row; more are taken when heads are unequal.
    block_p = min(max(16, triton.next_power_of_2(2 * (count // heads + splits))), 128)
    block_d = min(32, triton.next_power_of_2(width))
    _combine_kernel[(rows, heads, triton.cdiv(width, block_d))](
        part, part_lse, pieces.first, out, lse, q, center, *q.stride()[:3], float(scale),
        rows, tokens, heads, count, splits,
        G=group, D=width, BLOCK_D=block_d, BLOCK_P=block_p, CENTERED=channels is not None and softcap is None,
        OVERLAP=overlap and programs > 0, EARLY=early, num_warps=4, enable_fp_fusion=True,
        **launch_options(overlap and programs > 0),
    )  # fmt: skip
    return out, lse


def _parts(x: Tensor | Quantized) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Data, scales, zeros, bits and group of a context; codes as words of 16 bits, which the matrix loads can turn."""
    if not isinstance(x, Quantized):
        return x, x, x, 16, x.shape[1]
    if x.group * x.bits % 16:
        raise ValueError(
            f"expected groups of whole 16-bit words, got {x.group} values of {x.bits} bits: quantize again"
        )
    return x.codes.view(torch.int16), x.scale.contiguous(), x.zero.contiguous(), x.bits, x.group


@triton.jit(
    do_not_specialize=[
        "window",
        "rows",
        "heads",
        "count",
        "row_blocks",
        "splits",
        "tail_blocks",
        "tail_piece",
        "capacity",
    ]
)
@no_type_check
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, center_ptr, spread_ptr,
    offsets_ptr, bounds_ptr,
    tail_k_ptr, tail_v_ptr, lengths_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn,
    stride_tkb, stride_tkh, stride_tkr, stride_tvb, stride_tvh, stride_tvr,
    scale, softcap, window, rows, tokens, heads, count, row_blocks, splits, tail_blocks, tail_piece, capacity,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr, TAIL_N: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TAIL: tl.constexpr, COMPUTE: tl.constexpr,
    CODE_COMPUTE: tl.constexpr, PACKED: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
    SHORT: tl.constexpr, CHANNELS: tl.constexpr, RESERVED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows against one piece of the context (programs 0 to count * row_blocks) or of a tail."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    reserve(RESERVED)
    program = tl.program_id(0)
    if program < count * row_blocks:
        piece = program // row_blocks
        row = program % row_blocks * BLOCK_M
        head = tl.load(bounds_ptr + piece * 3)
        start = tl.load(bounds_ptr + piece * 3 + 1)
        stop = tl.load(bounds_ptr + piece * 3 + 2)
        if EARLY:
            TWO_TILES: tl.constexpr = triton.next_power_of_2(2 * BLOCK_N * D * BITS // 8)
            prefetch_rows(k_ptr, start, stop, stride_kn, TWO_TILES)
            prefetch_rows(v_ptr, start, stop, stride_vn, TWO_TILES)
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
            start = tl.maximum(start, tl.min(low, 0))
            stop = tl.maximum(start, tl.minimum(stop, tl.max(high, 0)))
        if BITS == 16:
            rows_piece(
                q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
                head, row, rows, piece, start, stop, low, high, rows, tokens,
                G, D, BLOCK_M, BLOCK_N, SOFTCAP, WINDOW, COMPUTE,
            )  # fmt: skip
        else:
            codes_piece(
                q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, center_ptr, spread_ptr,
                part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
                head, row, rows, piece, start, stop, low, high, rows, tokens,
                G, D, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, WINDOW, CODE_COMPUTE, PACKED, SHORT, CHANNELS,
            )  # fmt: skip
    else:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        program -= count * row_blocks
        block = program % tail_blocks
        split = program // tail_blocks % splits
        head = program // tail_blocks // splits % heads
        question = program // tail_blocks // splits // heads
        length = tl.minimum(tl.load(lengths_ptr + question), capacity)
        row_stop = (question + 1) * tokens * G
        row = question * tokens * G + block * TAIL_M
        r = tl.minimum(row + tl.arange(0, TAIL_M), row_stop - 1)
        position = length - tokens + r // G % tokens
        first = position - window + 1 if WINDOW else position * 0
        after = position + 1
        start = tl.maximum(split * tail_piece, tl.min(first, 0))
        stop = tl.minimum(split * tail_piece + tail_piece, tl.minimum(length, tl.max(after, 0)))
        slot = count + head * splits + split
        if start < stop:
            key_head = question.to(tl.int64)
            tail_k = tail_k_ptr + key_head * stride_tkb + head.to(tl.int64) * stride_tkh
            tail_v = tail_v_ptr + key_head * stride_tvb + head.to(tl.int64) * stride_tvh
            rows_piece(
                q_ptr, tail_k, tail_v, part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_tkr, stride_tvr, scale, softcap,
                head, row, row_stop, slot, start, stop, first, after, rows, tokens,
                G, D, TAIL_M, TAIL_N, SOFTCAP, True, COMPUTE,
            )  # fmt: skip
        else:
            r = row + tl.arange(0, TAIL_M)
            tl.store(part_lse_ptr + slot.to(tl.int64) * rows + r, float("-inf"), mask=r < row_stop)


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "count", "splits"])
@no_type_check
def _combine_kernel(
    part_ptr, part_lse_ptr, first_ptr, out_ptr, lse_ptr, q_ptr, center_ptr, stride_qb, stride_qh, stride_qt, scale,
    rows, tokens, heads, count, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, CENTERED: tl.constexpr,
    OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one row of one head, its partial results weighted by their log-sum-exp.

    CENTERED: those of the context lack scale * q . center.
    """
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    row, head = tl.program_id(0), tl.program_id(1)
    b, t, g = row // G // tokens, row // G % tokens, row % G
    first = tl.load(first_ptr + head)
    pieces = tl.load(first_ptr + head + 1) - first
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
    for at in range(0, pieces + splits, BLOCK_P):
        i = at + tl.arange(0, BLOCK_P)
        slot = tl.where(i < pieces, first + i, count + head * splits + i - pieces)
        place = slot.to(tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + place, mask=i < pieces + splits, other=float("-inf"))
        if CENTERED:
            lse += tl.where(i < pieces, shift, 0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = exp2((lse - floor) * LOG2_E, EXACT)
        live = (i < pieces + splits)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=live, other=0)
        part = tl.where((lse != float("-inf"))[:, None], part, 0)  # nothing was written there
        decay = exp2((peak - floor) * LOG2_E, EXACT)
        acc = acc * decay + tl.sum(weight[:, None] * part, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak
    place = (b.to(tl.int64) * heads * G + head * G + g) * tokens + t
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + place * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + place, peak + tl.log(total), mask=tl.program_id(2) == 0)
