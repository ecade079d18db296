"""Decode on the GPU: pieces of context and tails in one launch, their partial results combined in another."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.decode import DecodeSchedule, Pieces, Tail, decode_schedule
from kvzip.ops.quantize import Quantized
from kvzip.ops.triton.common import (
    LN_2,
    LOG2_E,
    check_rows,
    compute_dtype,
    interpreted,
    load_rows,
    overlaps_launches,
    tanh,
)

_TAIL_PIECE = 256  # rows of a tail that a program takes, times the programs that share them


class Launch(NamedTuple):
    """Sizes of one launch: rows and keys of a tile, warps of a program, stages of its load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def launch_config(D: int, rows: int, dtype: torch.dtype, bits: int = 16) -> Launch:
    """The launch for `rows` query rows that share a head's context. Tuned on an H100, 2026-11-24."""
    if dtype == torch.float32:  # products in plain float32: no tensor cores
        return Launch(16, 16, 4 if D <= 64 else 8, 2)
    keys = 64 if D <= 128 else 32
    if rows <= 16:
        keys = 32 if bits < 16 and D < 128 else keys  # unpacking narrow rows of 64 keys spills
        return Launch(16, keys, 4, 3)
    if rows <= 64:
        return Launch(32 if rows <= 32 else 64, keys, 4, 3)
    return Launch(128, keys, 8, 3)


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
    """`decode` by two launches whose sizes follow from shapes and the schedule alone.

    Reads each context byte once for up to 128 rows (questions x tokens x group): 2 N D values, 161 MB at 0.3 of
    131,072 (8 heads, D 128), 52.5 us at the 3.07 TB/s of an H100; 4 rows N D operations. Measured there (bf16, cold,
    in a CUDA graph, benchmarks/results/ops-decode-score.jsonl): 61.2 us, and 20.9 us at 0.3 of 32,768; one head with
    half of the rows 62.1, even heads 60.0; 32 questions 74.8; int8 40.0, int4 30.9; D=256 117.8 (2.73 TB/s). With 512
    and 2,000 new tokens 432 and 443 TFLOP/s by the same kernel with 128 rows a program.

    Tried, in us at 131,072 unless said: three to eight pieces per processor 66 to 80 (starting a program costs more
    than balance gains); tiles of 128 keys 69, pipelines of two stages 64; combining without overlapped launches 62.3;
    32 partial results at a time instead of all 63.6 (23.2 instead of 20.2 at 32,768). Codes: bytes converted by
    Triton 55.7 (int8) and 58.7 (int4), against 41.9 and 31.8 as 16-bit words unpacked two at a time to float16, and
    40.2 and 29.3 with the steps prefetched to L2; loading steps two tiles ahead by hand stops Triton's pipelining.
    What is left there is instructions: about 540 a tile of 64 keys, by count 63% of the issue slots (not profiled).
    """
    rows = q[:, 0, :, 0].numel() * (q.shape[1] // (len(offsets) - 1))
    config = launch_config(q.shape[3], rows, q.dtype, k.bits if isinstance(k, Quantized) else 16)
    schedule = decode_schedule(offsets) if schedule is None else schedule
    pieces = choose_level(schedule, config, rows)
    return launch(q, k, v, offsets, scale, softcap, window, pieces, tail, config, overlaps_launches(q))


def choose_level(schedule: DecodeSchedule, config: Launch, rows: int) -> Pieces:
    """The longest pieces that still make four programs per processor; else two or one, as many as fit it at once."""
    blocks = triton.cdiv(rows, config.block_m)
    enough = [level for level in schedule.levels if len(level.bounds) * blocks >= 4 * schedule.processors]
    return enough[-1] if enough else schedule.levels[1 if config.block_m > 64 else 0]


def launch(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    offsets: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    pieces: Pieces,
    tail: Tail | None,
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
    check_rows(q=q, k=k_codes, v=v_codes, tail_k=tail_k, tail_v=tail_v)
    compute = compute_dtype(q)
    packed = bits < 16 and compute != tl.float32 and not interpreted()

    count, row_blocks = len(pieces.bounds), triton.cdiv(rows, config.block_m)
    capacity = 0 if tail is None else tail_k.shape[2]
    tail_blocks = triton.cdiv(tokens * group, config.block_m)
    tail_piece = _TAIL_PIECE * tail_blocks
    splits = triton.cdiv(capacity, tail_piece)
    slots = count + heads * splits
    part = torch.empty((slots, rows, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((slots, rows), dtype=torch.float32, device=q.device)
    programs = count * row_blocks + queries * heads * splits * tail_blocks
    if programs:
        _decode_kernel[(programs,)](
            q, k_codes, v_codes, k_scale, k_zero, v_scale, v_zero, offsets, pieces.bounds,
            tail_k, tail_v, lengths, part, part_lse,
            *q.stride()[:3], k_codes.stride(0), v_codes.stride(0), *tail_k.stride()[:3], *tail_v.stride()[:3],
            float(scale), float(softcap or 1.0), 0 if window is None else window,
            rows, tokens, heads, count, row_blocks, splits, tail_blocks, tail_piece, capacity,
            G=group, D=width, BITS=bits, GROUP=k_group, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SOFTCAP=softcap is not None, WINDOW=window is not None, TAIL=splits > 0,
            COMPUTE=compute, CODE_COMPUTE=tl.float16 if packed else compute, PACKED=packed, OVERLAP=overlap,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    # As a rule one step of the loop takes all the partial results of a row; more are taken when heads are unequal.
    block_p = min(max(16, triton.next_power_of_2(2 * (count // heads + splits))), 128 if width <= 128 else 64)
    _combine_kernel[(rows, heads)](
        part, part_lse, pieces.first, out, lse, rows, tokens, heads, count, splits,
        G=group, D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_P=block_p,
        OVERLAP=overlap and programs > 0, num_warps=4 if width <= 128 else 8, enable_fp_fusion=True,
        **({"launch_pdl": True} if overlap and programs else {}),
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


@triton.jit
@no_type_check
def _codes(words, PART: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr):
    """Code number PART of each 16-bit word, minus half the number of codes, exact in any COMPUTE.

    PACKED takes two words at a time to float16: a code's bits below those of 1024, and 1024 taken away.
    """
    if not PACKED:
        SHIFT: tl.constexpr = 8 * PART if BITS == 8 else 8 * (PART // 2) + 4 - 4 * (PART % 2)
        return (((words.to(tl.int32) >> SHIFT) & (2**BITS - 1)) - 2 ** (BITS - 1)).to(COMPUTE)
    elif BITS == 8:
        SELECT: tl.constexpr = "0x4240" if PART == 0 else "0x4341"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x, c; prmt.b32 x, $1, 0x64646464, " + SELECT + "; mov.b32 c, 0xE480E480; "
            "add.rn.f16x2 $0, x, c; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif PART % 2 == 0:
        SHIFT: tl.constexpr = "0" if PART == 0 else "8"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x, c, d; shr.b32 x, $1, " + SHIFT + "; lop3.b32 x, x, 0x00F000F0, 0x64006400, 0xEA; "
            "mov.b32 c, 0x2C002C00; mov.b32 d, 0xD480D480; fma.rn.f16x2 $0, x, c, d; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        SHIFT: tl.constexpr = "0" if PART == 1 else "8"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x, c; shr.b32 x, $1, " + SHIFT + "; lop3.b32 x, x, 0x000F000F, 0x64006400, 0xEA; "
            "mov.b32 c, 0xE408E408; add.rn.f16x2 $0, x, c; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
@no_type_check
def _add_product(
    x, q, words, inside, PART: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr
):
    codes = _codes(words, PART, BITS, COMPUTE, PACKED)
    return tl.dot(tl.where(inside, q, 0).to(COMPUTE), tl.trans(codes), x, input_precision="ieee")


@triton.jit
@no_type_check
def _add_weighted(
    acc, weight, offset, words, inside, PART: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr,
    PACKED: tl.constexpr, ONLY: tl.constexpr,
):  # fmt: skip
    codes = _codes(words, PART, BITS, COMPUTE, PACKED)
    if ONLY:
        return tl.dot(weight, codes, acc, input_precision="ieee")
    else:
        return acc + tl.where(inside, tl.dot(weight, codes, input_precision="ieee") + offset[:, None], 0)


@triton.jit
@no_type_check
def _steps(
    scale_ptr, zero_ptr, row, bound, PART: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The step of each row's group PART, and the value in the middle of its codes."""
    n = tl.arange(0, BLOCK_N)
    place = (row + n + tl.zeros([], tl.int64)) * Q + PART
    step = tl.load(scale_ptr + place, mask=n < bound, other=0).to(tl.float32)
    zero = tl.load(zero_ptr + place, mask=n < bound, other=0).to(tl.float32)
    return step, zero + 2 ** (BITS - 1) * step


@triton.jit
@no_type_check
def _fetch(ptr, start, stop, Q: tl.constexpr):
    """Asks the L2 cache for the steps of 4096 rows, so that the loop waits for it and not for memory."""
    row = tl.minimum(start + 32 * tl.arange(0, 128), stop - 1) + tl.zeros([], tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(ptr + row * Q).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
@no_type_check
def _step(
    acc, acc_1, acc_2, acc_3, peak, total, shift, q, q_1, q_2, q_3,
    k_step, k_middle, v_step, v_middle, norm,
    at, stop, low, high, scale, softcap,
    k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
    D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    BANDED: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr, DEFER: tl.constexpr,
):  # fmt: skip
    """Folds keys at:at + BLOCK_N into the softmax. MASKED: only those before stop; BANDED: low <= key < high."""
    n = tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    start = at + tl.zeros([], tl.int64)
    bound = stop - at
    Q: tl.constexpr = D // GROUP
    k = load_rows(k_ptr + start * stride_kn, n, w, stride_kn, bound, MASKED, W, BLOCK_W)  # [BLOCK_N, BLOCK_W]
    if BITS == 16:
        x = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    else:
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        each: tl.constexpr = GROUP * BITS // 16  # words of a group
        for part in tl.static_range(Q):
            inside = (w // each == part)[None, :]
            y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            y = _add_product(y, q, k, inside, 0, BITS, COMPUTE, PACKED)
            y = _add_product(y, q_1, k, inside, 1, BITS, COMPUTE, PACKED)
            q_sum = tl.sum(tl.where(inside, q.to(tl.float32) + q_1.to(tl.float32), 0), 1)
            if BITS == 4:
                y = _add_product(y, q_2, k, inside, 2, BITS, COMPUTE, PACKED)
                y = _add_product(y, q_3, k, inside, 3, BITS, COMPUTE, PACKED)
                q_sum += tl.sum(tl.where(inside, q_2.to(tl.float32) + q_3.to(tl.float32), 0), 1)
            if part > 0:
                k_step, k_middle = _steps(k_scale_ptr, k_zero_ptr, at, bound, part, Q, BITS, BLOCK_N)
            x += y * k_step[None, :] + q_sum[:, None] * k_middle[None, :]
        x *= (norm * scale if SOFTCAP else norm * (scale * LOG2_E))[:, None]
    # From here x is in units that `unit` brings to logarithms of base 2.
    if BITS < 16:
        unit = 1.0
        if SOFTCAP:
            x = tanh(x / softcap) * (softcap * LOG2_E)
    elif SOFTCAP:
        unit = LOG2_E
        x = tanh(x * (scale / softcap)) * softcap
    else:
        unit = scale * LOG2_E
    if MASKED:
        x = tl.where((n < bound)[None, :], x, float("-inf"))
    if BANDED:
        key = at + n
        x = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), x, float("-inf"))
    if BITS < 16:
        # Weights times steps go to the tensor cores in 16 bits. The power of two of the largest step of a row joins
        # its exponent, so that they stay near 1 whatever the steps are.
        largest = v_step
        for part in tl.static_range(1, Q):
            other, _ = _steps(v_scale_ptr, v_zero_ptr, at, bound, part, Q, BITS, BLOCK_N)
            largest = tl.maximum(largest, other)
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -60)
        down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)  # 2 ** -exponent
        x += exponent.to(tl.float32)[None, :]
    new_peak = tl.maximum(peak, tl.max(x, 1))
    if BANDED:
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        floor = new_peak
    decay = tl.exp2((peak - floor) * unit)
    p = tl.exp2((x - floor[:, None]) * unit)
    if BITS == 16:
        mass = p
    else:
        mass = p * down[None, :]
    if DEFER:
        total = total * decay[:, None] + mass
    else:
        total = total * decay + tl.sum(mass, 1)
    v = load_rows(v_ptr + start * stride_vn, n, w, stride_vn, bound, MASKED, W, BLOCK_W)
    acc = acc * decay[:, None]
    if BITS == 16:
        acc = tl.dot(p.to(COMPUTE), v.to(COMPUTE), acc, input_precision="ieee")
    else:
        acc_1 = acc_1 * decay[:, None]
        if BITS == 4:
            acc_2 = acc_2 * decay[:, None]
            acc_3 = acc_3 * decay[:, None]
        for part in tl.static_range(Q):
            inside = (w // each == part)[None, :]
            if part > 0:
                v_step, v_middle = _steps(v_scale_ptr, v_zero_ptr, at, bound, part, Q, BITS, BLOCK_N)
            weight = (p * (v_step * down)[None, :]).to(COMPUTE)
            offset = p * (v_middle * down)[None, :]
            if Q > 1:
                offset = tl.sum(offset, 1)
            elif DEFER:
                shift = shift * decay[:, None] + offset
            else:
                shift = shift * decay + tl.sum(offset, 1)
            acc = _add_weighted(acc, weight, offset, v, inside, 0, BITS, COMPUTE, PACKED, Q == 1)
            acc_1 = _add_weighted(acc_1, weight, offset, v, inside, 1, BITS, COMPUTE, PACKED, Q == 1)
            if BITS == 4:
                acc_2 = _add_weighted(acc_2, weight, offset, v, inside, 2, BITS, COMPUTE, PACKED, Q == 1)
                acc_3 = _add_weighted(acc_3, weight, offset, v, inside, 3, BITS, COMPUTE, PACKED, Q == 1)
    return acc, acc_1, acc_2, acc_3, new_peak, total, shift


@triton.jit
@no_type_check
def _load_q(at, w, live, PART: tl.constexpr, EACH: tl.constexpr, norm, COMPUTE: tl.constexpr):
    q = tl.load(at[:, None] + (EACH * w + PART)[None, :], mask=live, other=0)
    return (q.to(tl.float32) / norm[:, None]).to(COMPUTE)


@triton.jit
@no_type_check
def _piece(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
    head, row, row_stop, slot, start, stop, low, high, rows, tokens,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, BANDED: tl.constexpr, COMPUTE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Writes the attention of BLOCK_M rows over keys start:stop of one head to slot of the partial results."""
    EACH: tl.constexpr = 16 // BITS  # values in a word
    W: tl.constexpr = D // EACH
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    DEFER: tl.constexpr = BLOCK_M == 16  # few rows: summing a tile's keys would go through shared memory
    w = tl.arange(0, BLOCK_W)
    m = row + tl.arange(0, BLOCK_M)
    live = (m < row_stop)[:, None] & (w < W)[None, :]
    b, t, g = (m // G // tokens).to(tl.int64), m // G % tokens, m % G
    q_row = q_ptr + b * stride_qb + (head * G + g).to(tl.int64) * stride_qh + t.to(tl.int64) * stride_qt
    zeros = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    if DEFER:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = zeros
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if BITS == 16:
        q = tl.load(q_row[:, None] + w[None, :], mask=live, other=0).to(COMPUTE)
        q_1, q_2, q_3, acc_1, acc_2, acc_3, shift, norm = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        k_step, k_middle, v_step, v_middle = 0.0, 0.0, 0.0, 0.0
    else:
        d = tl.arange(0, BLOCK_W * EACH)
        whole = tl.load(q_row[:, None] + d[None, :], mask=(m < row_stop)[:, None] & (d < D)[None, :], other=0)
        # Float16 holds any row once its largest value is near 1: divide by that value's power of two.
        top = tl.max(tl.abs(whole.to(tl.float32)), 1).to(tl.int32, bitcast=True) & 0x7F800000
        norm = tl.where(top == 0, 1.0, top.to(tl.float32, bitcast=True))
        q = _load_q(q_row, w, live, 0, EACH, norm, COMPUTE)
        q_1 = _load_q(q_row, w, live, 1, EACH, norm, COMPUTE)
        acc_1 = zeros
        shift = total
        q_2, q_3, acc_2, acc_3 = 0.0, 0.0, 0.0, 0.0
        if BITS == 4:
            q_2 = _load_q(q_row, w, live, 2, EACH, norm, COMPUTE)
            q_3 = _load_q(q_row, w, live, 3, EACH, norm, COMPUTE)
            acc_2 = zeros
            acc_3 = zeros
        Q: tl.constexpr = D // GROUP
        k_step, k_middle = _steps(k_scale_ptr, k_zero_ptr, start, stop - start, 0, Q, BITS, BLOCK_N)
        v_step, v_middle = _steps(v_scale_ptr, v_zero_ptr, start, stop - start, 0, Q, BITS, BLOCK_N)
    if BITS < 16:
        if PACKED:
            for at in range(start, stop, 128 * 32):
                _fetch(k_scale_ptr, at, stop, Q)
                _fetch(k_zero_ptr, at, stop, Q)
                _fetch(v_scale_ptr, at, stop, Q)
                _fetch(v_zero_ptr, at, stop, Q)
        for at in range(start, stop, BLOCK_N):
            ahead = at + BLOCK_N  # too narrow for asynchronous copies: loaded by hand, a tile before use
            next_k_step, next_k_middle = _steps(k_scale_ptr, k_zero_ptr, ahead, stop - ahead, 0, Q, BITS, BLOCK_N)
            next_v_step, next_v_middle = _steps(v_scale_ptr, v_zero_ptr, ahead, stop - ahead, 0, Q, BITS, BLOCK_N)
            acc, acc_1, acc_2, acc_3, peak, total, shift = _step(
                acc, acc_1, acc_2, acc_3, peak, total, shift, q, q_1, q_2, q_3,
    k_step, k_middle, v_step, v_middle, norm,
                at, stop, low, high, scale, softcap,
                k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
                D, W, BLOCK_W, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, True, BANDED, COMPUTE, PACKED, DEFER,
            )  # fmt: skip
            k_step, k_middle, v_step, v_middle = next_k_step, next_k_middle, next_v_step, next_v_middle
    elif BANDED:
        for at in range(start, stop, BLOCK_N):
            acc, acc_1, acc_2, acc_3, peak, total, shift = _step(
                acc, acc_1, acc_2, acc_3, peak, total, shift, q, q_1, q_2, q_3,
    k_step, k_middle, v_step, v_middle, norm,
                at, stop, low, high, scale, softcap,
                k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
                D, W, BLOCK_W, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, True, BANDED, COMPUTE, PACKED, DEFER,
            )  # fmt: skip
    else:
        full = start + (stop - start) // BLOCK_N * BLOCK_N
        for at in range(start, full, BLOCK_N):
            acc, acc_1, acc_2, acc_3, peak, total, shift = _step(
                acc, acc_1, acc_2, acc_3, peak, total, shift, q, q_1, q_2, q_3,
    k_step, k_middle, v_step, v_middle, norm,
                at, stop, low, high, scale, softcap,
                k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
                D, W, BLOCK_W, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, False, BANDED, COMPUTE, PACKED, DEFER,
            )  # fmt: skip
        if full < stop:
            acc, acc_1, acc_2, acc_3, peak, total, shift = _step(
                acc, acc_1, acc_2, acc_3, peak, total, shift, q, q_1, q_2, q_3,
    k_step, k_middle, v_step, v_middle, norm,
                full, stop, low, high, scale, softcap,
                k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_kn, stride_vn,
                D, W, BLOCK_W, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, True, BANDED, COMPUTE, PACKED, DEFER,
            )  # fmt: skip
    if DEFER:
        mass = tl.sum(total, 1)
    else:
        mass = total
    share = (1 / tl.where(mass == 0, 1.0, mass))[:, None]
    place = slot.to(tl.int64) * rows + m
    if BITS < 16:
        peak *= LN_2
    elif not SOFTCAP:
        peak *= scale
    tl.store(part_lse_ptr + place, peak + tl.log(mass), mask=m < row_stop)
    at_part = part_ptr + place[:, None] * D + (EACH * w)[None, :]
    if BITS < 16:
        if Q == 1:
            if DEFER:
                shift = tl.sum(shift, 1)
            acc += shift[:, None]
            acc_1 += shift[:, None]
            if BITS == 4:
                acc_2 += shift[:, None]
                acc_3 += shift[:, None]
        tl.store(at_part + 1, acc_1 * share, mask=live)
        if BITS == 4:
            tl.store(at_part + 2, acc_2 * share, mask=live)
            tl.store(at_part + 3, acc_3 * share, mask=live)
    tl.store(at_part, acc * share, mask=live)


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
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, offsets_ptr, bounds_ptr,
    tail_k_ptr, tail_v_ptr, lengths_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn,
    stride_tkb, stride_tkh, stride_tkr, stride_tvb, stride_tvh, stride_tvr,
    scale, softcap, window, rows, tokens, heads, count, row_blocks, splits, tail_blocks, tail_piece, capacity,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    TAIL: tl.constexpr, COMPUTE: tl.constexpr, CODE_COMPUTE: tl.constexpr, PACKED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows against one piece of the context (programs 0 to count * row_blocks) or of a tail."""
    if OVERLAP:
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
            G, D, BITS, GROUP, BLOCK_M, BLOCK_N, SOFTCAP, WINDOW, CODE_COMPUTE, PACKED,
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
        start = tl.maximum(split * tail_piece, tl.min(low, 0))
        stop = tl.minimum(split * tail_piece + tail_piece, tl.minimum(length, tl.max(high, 0)))
        slot = count + head * splits + split
        if start < stop:
            key_head = question.to(tl.int64)
            tail_k = tail_k_ptr + key_head * stride_tkb + head.to(tl.int64) * stride_tkh
            tail_v = tail_v_ptr + key_head * stride_tvb + head.to(tl.int64) * stride_tvh
            _piece(
                q_ptr, tail_k, tail_v, tail_k, tail_k, tail_k, tail_k, part_ptr, part_lse_ptr,
                stride_qb, stride_qh, stride_qt, stride_tkr, stride_tvr, scale, softcap,
                head, row, row_stop, slot, start, stop, low, high, rows, tokens,
                G, D, 16, D, BLOCK_M, BLOCK_N, SOFTCAP, True, COMPUTE, False,
            )  # fmt: skip
        else:
            m = row + tl.arange(0, BLOCK_M)
            tl.store(part_lse_ptr + slot.to(tl.int64) * rows + m, float("-inf"), mask=m < row_stop)


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "count", "splits"])
@no_type_check
def _combine_kernel(
    part_ptr, part_lse_ptr, first_ptr, out_ptr, lse_ptr, rows, tokens, heads, count, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one row of one head, its partial results weighted by their log-sum-exp."""
    row, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(first_ptr + head)
    pieces = tl.load(first_ptr + head + 1) - first
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for at in range(0, pieces + splits, BLOCK_P):
        i = at + tl.arange(0, BLOCK_P)
        slot = tl.where(i < pieces, first + i, count + head * splits + i - pieces)
        place = slot.to(tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + place, mask=i < pieces + splits, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2((lse - floor) * LOG2_E)
        live = (i < pieces + splits)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=live, other=0)
        part = tl.where((lse != float("-inf"))[:, None], part, 0)  # nothing was written there
        decay = tl.exp2((peak - floor) * LOG2_E)
        acc = acc * decay + tl.sum(weight[:, None] * part, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak
    b, t, g = row // G // tokens, row // G % tokens, row % G
    place = (b.to(tl.int64) * heads * G + head * G + g) * tokens + t
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + place * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + place, peak + tl.log(total))


def merge_triton(
    a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """`merge` in one pass: reads a and b once, writes once."""
    width = a.shape[-1]
    out, lse = (
        torch.empty(a.shape, dtype=a.dtype, device=a.device),
        torch.empty_like(lse_a, memory_format=torch.contiguous_format),
    )
    a, lse_a, b, lse_b = (x.contiguous() for x in (a, lse_a, b, lse_b))
    if out.numel():
        block = 16
        _merge_kernel[(triton.cdiv(lse.numel(), block),)](
            a, lse_a, b, lse_b, out, lse, lse.numel(),
            D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out, lse


@triton.jit
@no_type_check
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
    tl.store(lse_ptr + row, peak + tl.log(total), mask=row < rows)
