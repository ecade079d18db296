"""Attention over one split of a head whose rows are quantized in 8 or 4 bits, keys being rows (M) of the products.

Query rows are columns (N), where 8 need no padding to 16: half the products and softmax. Tuning: docs/tuning.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import LN_2, LOG2_E, add_product, exp2, load_rows, product, tanh


@triton.jit
@no_type_check
def prefetch_rows(ptr, begin, stop, stride, BYTES: tl.constexpr):
    """Prefetches the first BYTES of rows begin:stop to L2. It uses no value, so it may run before `await_launch`."""
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    at = begin.to(tl.int64) * stride * SIZE + 64 * tl.arange(0, BYTES // 64)
    address = ptr.to(tl.int64) + tl.minimum(at, (stop.to(tl.int64) * stride - 1) * SIZE)
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
@no_type_check
def _codes(words, PART: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr):
    """Code PART of each 16-bit word, times 2 ** -24, or 2 ** -20 for the high half of a byte.

    PACKED converts two words by one instruction: the bits of a code, read as float16, are a subnormal number, which
    tensor cores multiply exactly.
    """
    if not PACKED:
        SHIFT: tl.constexpr = 8 * PART if BITS == 8 else 8 * (PART // 2) + 4 - 4 * (PART % 2)
        CENTER: tl.constexpr = 2 ** (BITS - 1) if tl.float32 == COMPUTE else 0
        UNIT: tl.constexpr = 2.0**-24 if BITS == 8 or PART % 2 == 1 else 2.0**-20
        return ((((words.to(tl.int32) >> SHIFT) & (2**BITS - 1)) - CENTER).to(tl.float32) * UNIT).to(COMPUTE)
    elif BITS == 8:
        SELECT: tl.constexpr = "0x4240" if PART == 0 else "0x4341"
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, " + SELECT + ";", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        SHIFT: tl.constexpr = "0" if PART < 2 else "8"
        MASK: tl.constexpr = "0x00F000F0" if PART % 2 == 0 else "0x000F000F"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x; shr.b32 x, $1, " + SHIFT + "; and.b32 $0, x, " + MASK + "; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
@no_type_check
def _steps(
    scale_ptr, zero_ptr, row, stop, PART: tl.constexpr, Q: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The step of each row's group PART, and its zero."""
    n = tl.arange(0, BLOCK_N)
    place = (row + tl.zeros([], tl.int64)) * Q + (n * Q + PART)
    if MASKED:
        live = n < stop - row
        return tl.load(scale_ptr + place, mask=live, other=0), tl.load(zero_ptr + place, mask=live, other=0)
    else:
        return tl.load(scale_ptr + place), tl.load(zero_ptr + place)


@triton.jit
@no_type_check
def _load_transposed(ptr, rows, columns, stride, bound, MASKED: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """`load_rows`, transposed."""
    at = ptr + (rows[None, :] * stride + columns[:, None])
    if MASKED:
        if W == BLOCK_W:
            return tl.load(at, mask=(rows < bound)[None, :], other=0)
        else:
            return tl.load(at, mask=(rows < bound)[None, :] & (columns < W)[:, None], other=0)
    else:
        if W == BLOCK_W:
            return tl.load(at)
        else:
            return tl.load(at, mask=(columns < W)[:, None], other=0)


@triton.jit
@no_type_check
def _add_sum(total, decay, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEFER: tl.constexpr):
    """total * decay + the sum of x over keys; with DEFER only over those that one thread holds, every eighth."""
    if DEFER:
        return total * decay[None, :] + tl.sum(tl.reshape(x, [BLOCK_N // 8, 8, BLOCK_M]), 0)
    else:
        return total * decay + tl.sum(x, 0)


@triton.jit
@no_type_check
def _exponent(x):
    """The power of two below each x, at least -60."""
    return tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 127, -60)


@triton.jit
@no_type_check
def _add_product(
    x, q, k, inside, PART: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr,
    ONLY: tl.constexpr,
):  # fmt: skip
    codes = _codes(k, PART, BITS, COMPUTE, PACKED)
    if not ONLY:
        q = tl.where(inside, q, 0).to(COMPUTE)
    if tl.float32 == COMPUTE:
        return tl.fma(product(codes, tl.trans(q)), 1.0, x)
    else:
        return tl.dot(codes, q, x)


@triton.jit
@no_type_check
def _add_weighted(
    acc, weight, offset, v, inside, PART: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr,
    PACKED: tl.constexpr, ONLY: tl.constexpr,
):  # fmt: skip
    codes = _codes(v, PART, BITS, COMPUTE, PACKED)  # [BLOCK_W, BLOCK_N]
    if ONLY:
        return add_product(acc, codes, weight)
    else:
        UNIT: tl.constexpr = 2.0**24 if BITS == 8 or PART % 2 == 1 else 2.0**20
        return acc + tl.where(inside, tl.dot(codes, weight, input_precision="ieee") + offset[None, :] * (1 / UNIT), 0)


@triton.jit
@no_type_check
def _load_q(
    q_row, spread, w, live, factor, W: tl.constexpr, PART: tl.constexpr, EACH: tl.constexpr, COMPUTE: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    q = tl.load(q_row[None, :] + (EACH * w + PART)[:, None], mask=live, other=0).to(tl.float32)
    if CHANNELS:
        q *= tl.load(spread + EACH * w + PART, mask=w < W, other=0)[:, None]
    LIFT: tl.constexpr = 16.0 if EACH == 4 and PART % 2 == 1 else 1.0
    return (q * (factor * LIFT)).to(COMPUTE)


@triton.jit
@no_type_check
def quantized_split(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, center_ptr, spread_ptr,
    part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
    head, row, row_stop, slot, begin, stop, low, high, rows, tokens,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, BANDED: tl.constexpr, COMPUTE: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the attention of rows row:row_stop over keys begin:stop of one head to slot of the partial results.

    The logit of a row q and a key with codes c is scale * (step * (q . (c - half)) + (zero + half * step) * sum(q)),
    and weights p give sum(p * step * c) + sum(p * zero). With CHANNELS q is multiplied by its head's spread before
    that; scale * q . center, the same for all keys, is added here with SOFTCAP only, else to the log-sum-exp when
    splits are combined. BANDED: row i sees low[i] <= key < high[i] only; MASKED: the context is shorter than BLOCK_N.
    """
    EACH: tl.constexpr = 16 // BITS  # values in a word
    W: tl.constexpr = D // EACH
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    Q: tl.constexpr = D // GROUP
    WORDS: tl.constexpr = GROUP // EACH  # of a group
    UNIT: tl.constexpr = 2.0**-20 if BITS == 4 else 2.0**-24  # of products of q and codes
    HALF: tl.constexpr = 2 ** (BITS - 1)
    CENTER: tl.constexpr = HALF if tl.float32 == COMPUTE else 0  # what `_codes` has subtracted
    DEFER: tl.constexpr = BLOCK_M <= 16
    w = tl.arange(0, BLOCK_W)
    n = tl.arange(0, BLOCK_N)
    # Without MASKED all tiles are full: the last one starts earlier, and keys that an earlier tile had are masked.
    limit = stop if MASKED else tl.maximum(stop - BLOCK_N, 0)
    at = tl.minimum(begin, limit)
    # Steps are too narrow for asynchronous copies, so they are loaded here, one tile ahead.
    next_k, next_k_zero = _steps(k_scale_ptr, k_zero_ptr, at, stop, 0, Q, MASKED, BLOCK_N)
    next_v, next_v_zero = _steps(v_scale_ptr, v_zero_ptr, at, stop, 0, Q, MASKED, BLOCK_N)
    first_step = tl.load(v_scale_ptr + (at + tl.zeros([], tl.int64)) * Q)
    m = row + tl.arange(0, BLOCK_M)
    live_q = (w < W)[:, None] & (m < row_stop)[None, :]
    b, t, g = (m // G // tokens).to(tl.int64), m // G % tokens, m % G
    q_row = q_ptr + b * stride_qb + (head * G + g).to(tl.int64) * stride_qh + t.to(tl.int64) * stride_qt

    # q is scaled by a power of two that brings its largest finite value near 2 ** 10, so that float16 holds it.
    d = tl.arange(0, BLOCK_W * EACH)
    whole = tl.load(q_row[None, :] + d[:, None], mask=(d < D)[:, None] & (m < row_stop)[None, :], other=0)
    whole = whole.to(tl.float32)
    spread = spread_ptr + head * D
    if CHANNELS:  # q . (center + spread * rest) = q . center + (q * spread) . rest
        if SOFTCAP:
            central = tl.sum(whole * tl.load(center_ptr + head * D + d, mask=d < D, other=0)[:, None], 0) * scale
        whole *= tl.load(spread + d, mask=d < D, other=0)[:, None]
    top = tl.max(tl.abs(whole), 0).to(tl.int32, bitcast=True) >> 23
    top = tl.max(tl.where(top == 255, 0, top), 0)
    top = tl.minimum(tl.maximum(top, 27), 227)
    factor = ((264 - top) << 23).to(tl.float32, bitcast=True)  # 2 ** (10 - exponent of the largest)
    unit = ((top - 10) << 23).to(tl.float32, bitcast=True) * (scale / softcap if SOFTCAP else scale * LOG2_E)
    q = _load_q(q_row, spread, w, live_q, factor, W, 0, EACH, COMPUTE, CHANNELS)  # [BLOCK_W, BLOCK_M]
    q_1 = _load_q(q_row, spread, w, live_q, factor, W, 1, EACH, COMPUTE, CHANNELS)
    q_2, q_3 = q, q_1
    q_even, q_odd = q.to(tl.float32), q_1.to(tl.float32)
    if BITS == 4:
        q_2 = _load_q(q_row, spread, w, live_q, factor, W, 2, EACH, COMPUTE, CHANNELS)
        q_3 = _load_q(q_row, spread, w, live_q, factor, W, 3, EACH, COMPUTE, CHANNELS)
        q_even, q_odd = q_even + q_2.to(tl.float32), (q_odd + q_3.to(tl.float32)) * (1 / 16)
    q_word = q_even + q_odd  # sums of the values of a word
    q_sum = tl.sum(q_word, 0)

    acc = tl.zeros([BLOCK_W, BLOCK_M], tl.float32)
    acc_1, acc_2, acc_3 = acc, acc, acc
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if DEFER:
        total = tl.zeros([8, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
    shift = total
    # Weights times steps are 16-bit operands of the tensor cores. To keep them near 1 for any steps, the exponent of a
    # key's largest step, relative to that of the split's first key (0 if its step is 0), moves into the key's logit.
    common = tl.where(first_step == 0, 0, tl.minimum(_exponent(first_step.to(tl.float32)), 60))
    for new in range(begin, stop, BLOCK_N):
        at = tl.minimum(new, limit)
        key = at + n
        bound = stop - at
        here = at + tl.zeros([], tl.int64)
        k = load_rows(k_ptr + here * stride_kn, n, w, stride_kn, bound, MASKED, W, BLOCK_W)  # [BLOCK_N, BLOCK_W]
        v = _load_transposed(v_ptr + here * stride_vn, n, w, stride_vn, bound, MASKED, W, BLOCK_W)  # [BLOCK_W, BLOCK_N]
        k_step, k_zero = next_k.to(tl.float32), next_k_zero.to(tl.float32)
        v_step, v_zero = next_v.to(tl.float32), next_v_zero.to(tl.float32)
        after = tl.minimum(new + BLOCK_N, limit)
        next_k, next_k_zero = _steps(k_scale_ptr, k_zero_ptr, after, stop, 0, Q, MASKED, BLOCK_N)
        next_v, next_v_zero = _steps(v_scale_ptr, v_zero_ptr, after, stop, 0, Q, MASKED, BLOCK_N)
        largest = v_step
        for part in tl.static_range(1, Q):
            other, _ = _steps(v_scale_ptr, v_zero_ptr, at, stop, part, Q, MASKED, BLOCK_N)
            largest = tl.maximum(largest, other.to(tl.float32))
        exponent = _exponent(largest)
        above = tl.minimum(tl.maximum(exponent - common, -126), 126)
        up = ((127 - exponent) << 23).to(tl.float32, bitcast=True)  # 2 ** -exponent
        down = ((127 - above) << 23).to(tl.float32, bitcast=True)  # 2 ** -above
        bias = tl.where((key >= new) & (key < stop), above.to(tl.float32), float("-inf"))[:, None]

        x = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for part in tl.static_range(Q):
            inside = (w // WORDS == part)[:, None]
            if Q > 1:
                q_sum = tl.sum(tl.where(inside, q_word, 0), 0)
            if part > 0:
                k_step, k_zero = _steps(k_scale_ptr, k_zero_ptr, at, stop, part, Q, MASKED, BLOCK_N)
                k_step, k_zero = k_step.to(tl.float32), k_zero.to(tl.float32)
            y = tl.broadcast_to((q_sum * ((CENTER - HALF) * UNIT))[None, :], [BLOCK_N, BLOCK_M])
            y = _add_product(y, q, k, inside, 0, BITS, COMPUTE, PACKED, Q == 1)
            y = _add_product(y, q_1, k, inside, 1, BITS, COMPUTE, PACKED, Q == 1)
            if BITS == 4:
                y = _add_product(y, q_2, k, inside, 2, BITS, COMPUTE, PACKED, Q == 1)
                y = _add_product(y, q_3, k, inside, 3, BITS, COMPUTE, PACKED, Q == 1)
            middle = ((k_zero + HALF * k_step) * unit)[:, None] * q_sum[None, :]
            if Q == 1 and not SOFTCAP:
                middle += bias
            x += y * (k_step * (unit * (1 / UNIT)))[:, None] + middle
        if SOFTCAP:
            if CHANNELS:
                x += (central / softcap)[None, :]
            x = tanh(x) * (softcap * LOG2_E)
        if Q > 1 or SOFTCAP:
            x += bias
        if BANDED:
            x = tl.where((key[:, None] >= low[None, :]) & (key[:, None] < high[None, :]), x, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(x, 0))
        if BANDED:
            floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            floor = new_peak
        EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
        decay = exp2(peak - floor, EXACT)
        p = exp2(x - floor[None, :], EXACT)
        peak = new_peak

        total = _add_sum(total, decay, p * down[:, None], BLOCK_M, BLOCK_N, DEFER)
        acc = acc * decay[None, :]
        acc_1 = acc_1 * decay[None, :]
        if BITS == 4:
            acc_2 = acc_2 * decay[None, :]
            acc_3 = acc_3 * decay[None, :]
        for part in tl.static_range(Q):
            inside = (w // WORDS == part)[:, None]
            if part > 0:
                v_step, v_zero = _steps(v_scale_ptr, v_zero_ptr, at, stop, part, Q, MASKED, BLOCK_N)
                v_step, v_zero = v_step.to(tl.float32), v_zero.to(tl.float32)
            weight = (p * (v_step * up)[:, None]).to(COMPUTE)
            offset = p * ((v_zero + CENTER * v_step) * up)[:, None]
            if Q == 1:
                shift = _add_sum(shift, decay, offset, BLOCK_M, BLOCK_N, DEFER)
            else:
                offset = tl.sum(offset, 0)
            acc = _add_weighted(acc, weight, offset, v, inside, 0, BITS, COMPUTE, PACKED, Q == 1)
            acc_1 = _add_weighted(acc_1, weight, offset, v, inside, 1, BITS, COMPUTE, PACKED, Q == 1)
            if BITS == 4:
                acc_2 = _add_weighted(acc_2, weight, offset, v, inside, 2, BITS, COMPUTE, PACKED, Q == 1)
                acc_3 = _add_weighted(acc_3, weight, offset, v, inside, 3, BITS, COMPUTE, PACKED, Q == 1)
    if DEFER:
        total = tl.sum(total, 0)
        shift = tl.sum(shift, 0)
    place = slot.to(tl.int64) * rows + m
    tl.store(part_lse_ptr + place, peak * LN_2 + tl.log(total), mask=m < row_stop)
    share = ((127 + common) << 23).to(tl.float32, bitcast=True) / tl.where(total == 0, 1.0, total)[None, :]
    at_part = part_ptr + place[None, :] * D + (EACH * w)[:, None]
    tl.store(at_part, (acc * (1 / UNIT) + shift[None, :]) * share, mask=live_q)
    tl.store(at_part + 1, (acc_1 * 2.0**24 + shift[None, :]) * share, mask=live_q)
    if BITS == 4:
        tl.store(at_part + 2, (acc_2 * 2.0**20 + shift[None, :]) * share, mask=live_q)
        tl.store(at_part + 3, (acc_3 * 2.0**24 + shift[None, :]) * share, mask=live_q)
