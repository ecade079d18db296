"""Attention of rows of 16 or 32 bits over one split of a head or of a tail, queries being rows (M) of the products."""

from typing import no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import LOG2_E, add_product, exp2, load_rows, product, tanh


@triton.jit
@no_type_check
def rows_split(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, scale, softcap,
    head, row, row_stop, slot, begin, stop, low, high, rows, tokens,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
    BANDED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Writes the attention of rows row:row_stop over keys begin:stop of one head to slot of the partial results.

    BANDED: row i sees low[i] <= key < high[i] only.
    """
    BLOCK_D: tl.constexpr = 16 if D < 16 else triton.next_power_of_2(D)
    DEFER: tl.constexpr = BLOCK_M <= 16  # few rows: summing over keys in each tile would go through shared memory
    d = tl.arange(0, BLOCK_D)
    m = row + tl.arange(0, BLOCK_M)
    live = (m < row_stop)[:, None] & (d < D)[None, :]
    b, t, g = (m // G // tokens).to(tl.int64), m // G % tokens, m % G
    q_row = q_ptr + b * stride_qb + (head * G + g).to(tl.int64) * stride_qh + t.to(tl.int64) * stride_qt
    q = tl.load(q_row[:, None] + d[None, :], mask=live, other=0).to(COMPUTE)  # [BLOCK_M, BLOCK_D]
    if DEFER:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if BANDED:
        for at in range(begin, stop, BLOCK_N):
            acc, peak, total = _step(acc, peak, total, q, at, stop, low, high, scale, softcap, k_ptr, v_ptr, stride_kn,
                                     stride_vn, D, BLOCK_D, BLOCK_N, SOFTCAP, True, True, COMPUTE, DEFER)  # fmt: skip
    else:
        full = begin + (stop - begin) // BLOCK_N * BLOCK_N
        for at in range(begin, full, BLOCK_N):
            acc, peak, total = _step(acc, peak, total, q, at, stop, low, high, scale, softcap, k_ptr, v_ptr, stride_kn,
                                     stride_vn, D, BLOCK_D, BLOCK_N, SOFTCAP, False, False, COMPUTE, DEFER)  # fmt: skip
        if full < stop:
            acc, peak, total = _step(acc, peak, total, q, full, stop, low, high, scale, softcap, k_ptr, v_ptr,
                                     stride_kn, stride_vn, D, BLOCK_D, BLOCK_N, SOFTCAP, True, False, COMPUTE,
                                     DEFER)  # fmt: skip
    if DEFER:
        total = tl.sum(total, 1)
    place = slot.to(tl.int64) * rows + m
    if not SOFTCAP:
        peak *= scale
    tl.store(part_lse_ptr + place, peak + tl.log(total), mask=m < row_stop)
    share = 1 / tl.where(total == 0, 1.0, total)
    tl.store(part_ptr + place[:, None] * D + d[None, :], acc * share[:, None], mask=live)


@triton.jit
@no_type_check
def _step(
    acc, peak, total, q, at, stop, low, high, scale, softcap, k_ptr, v_ptr, stride_kn, stride_vn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    BANDED: tl.constexpr, COMPUTE: tl.constexpr, DEFER: tl.constexpr,
):  # fmt: skip
    """Adds keys at:at + BLOCK_N to the running softmax. MASKED: only those before stop; BANDED: low <= key < high."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    here = at + tl.zeros([], tl.int64)
    bound = stop - at
    k = load_rows(k_ptr + here * stride_kn, n, d, stride_kn, bound, MASKED, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    x = product(q, k.to(COMPUTE))  # [BLOCK_M, BLOCK_N]
    # From here x * unit is the logit in base 2.
    if SOFTCAP:
        unit = LOG2_E
        x = tanh(x * (scale / softcap)) * softcap
    else:
        unit = scale * LOG2_E
    if MASKED:
        x = tl.where((n < bound)[None, :], x, float("-inf"))
    if BANDED:
        key = at + n
        x = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), x, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(x, 1))
    if BANDED:
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        floor = new_peak
    EXACT: tl.constexpr = k_ptr.dtype.element_ty == tl.float32
    decay = exp2((peak - floor) * unit, EXACT)
    p = exp2((x - floor[:, None]) * unit, EXACT)
    if DEFER:
        total = total * decay[:, None] + p
    else:
        total = total * decay + tl.sum(p, 1)
    v = load_rows(v_ptr + here * stride_vn, n, d, stride_vn, bound, MASKED, D, BLOCK_D)
    acc = add_product(acc * decay[:, None], p.to(COMPUTE), v.to(COMPUTE))
    return acc, new_peak, total
