"""Attention of query rows over one split of a context's head or of a tail: one loop for all formats of rows.

Query rows are the rows (M) of the products. Codes have two ways. With few query rows keys are the rows, and query rows
the columns (N), where 8 need no padding to 16: what is a key's own is applied to logits and weights. With many, values
become rows of the model's dtype, once for all query rows; keys stay codes, whose logits are exact. Tuning:
docs/tuning.md.
"""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import LN_2, LOG2_E, add_product, dtype_of, exp2, product, tanh
from kvzip.ops.triton.decode_codes import (
    codes,
    expand_rows,
    join_codes,
    load_queries_for_codes,
    out_of_pairs,
)
from kvzip.ops.triton.decode_load import (
    keys_of,
    load_queries,
    load_tile,
    load_together,
    load_vector,
    same,
    store_together,
    take_apart,
)
from kvzip.ops.triton.turn import mix_parts, mix_words_of, turn_rows


class Form(NamedTuple):
    """What a split is compiled for.

    Dtypes are held by their names (`dtype_of`): where a program watches what is compiled, as vLLM does, Triton tells
    it in JSON, and fails for dtypes within a tuple.
    """

    G: int  # query heads of a KV head
    D: int
    M: int  # query rows of a tile
    N: int  # keys of a tile
    K_BITS: int  # 16: rows of the model's own dtype; 8, 4 or 2: codes
    V_BITS: int
    K_GROUP: int  # values that share a step
    V_GROUP: int
    COMPUTE: str  # dtype of products of plain rows
    K_COMPUTE: str  # and of keys and values as they are stored
    V_COMPUTE: str
    PACKED: bool  # codes become float16 by one instruction for two words
    SOFTCAP: bool
    BIAS: bool
    CHANNELS: bool  # keys have centers and spreads
    TURN_K: bool  # keys are turned, and so queries are
    TURN_V: bool  # values are turned, and so what they give is turned back
    TURN: str  # dtype of products that turn
    PAGE: int  # rows of a page, or 0
    BANDED: bool  # row i sees low[i] <= key < high[i] only: with a window, and always in a tail
    WINDOW: bool
    SHORT: bool  # there may be fewer rows than a tile has
    KEYS_FIRST: bool  # keys are the rows of the products; else rows of codes have one step each
    PARTS: int  # of a tile's keys, each with a running softmax and a warp of its own


@triton.jit
@no_type_check
def attend_split(query, keys, values, extra, band, out, begin, stop, scale, softcap, F: tl.constexpr):
    """Writes the attention of query rows over keys begin:stop, and its log-sum-exp, to partial results.

    The logit of a row q and a key with codes c is scale * (step * (q . c) + zero * sum(q)), and weights p give
    sum(p * step * c) + sum(p * zero). With KEYS_FIRST half of the greatest code is taken from c: sums stay small.
    With CHANNELS q is multiplied by its head's spread before that; scale * q . center, the same for all keys, is added
    here with SOFTCAP only, else to the log-sum-exp when splits are combined.

    Args:
        query: addresses of the rows' first values, and which rows exist.
        keys, values: address of row 0, of its step and zero, and the stride of rows.
        extra: addresses of centers, spreads, biases and a page table, and strides of pages of keys and values.
        band: low and high.
        out: addresses of partial results and their log-sum-exp, and the rows' places among them.
    """
    M: tl.constexpr = F.M
    N: tl.constexpr = F.N
    q_at, live = query
    part_ptr, part_lse_ptr, place = out
    EACH: tl.constexpr = 16 // F.V_BITS
    W: tl.constexpr = F.D // EACH
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    DEFER: tl.constexpr = M <= 16
    CODED: tl.constexpr = F.K_BITS < 16 or F.V_BITS < 16
    WEIGHED: tl.constexpr = F.V_BITS < 16 and F.KEYS_FIRST  # codes of values meet weights times steps
    # Without SHORT all tiles of codes are full: the last one starts earlier, and keys of an earlier tile are masked.
    limit = tl.maximum(stop - N, 0) if CODED and not F.SHORT else stop
    at = tl.minimum(begin, limit)
    LATE: tl.constexpr = CODED and not F.KEYS_FIRST  # loading the queries takes all registers then
    if not LATE:
        ahead = _load_ahead(keys, values, extra, at, stop, F)
    if WEIGHED:
        first = tl.load(values[1] + (at + tl.zeros([], tl.int64)) * (F.D // F.V_GROUP), mask=begin < stop, other=0)
    if F.K_BITS < 16:
        queries = load_queries_for_codes(q_at, live, extra[0], extra[1], scale, softcap, F)
    else:
        queries = load_queries(q_at, live, F.D, dtype_of(F.K_COMPUTE))
    if LATE:
        ahead = _load_ahead(keys, values, extra, at, stop, F)
    P: tl.constexpr = F.PARTS
    tl.static_assert(P == 1 or DEFER)  # sums are those of parts
    if F.KEYS_FIRST:
        acc = ()
        for _ in tl.static_range(EACH):
            acc += (tl.zeros([P, BLOCK_W, M] if P > 1 else [BLOCK_W, M], tl.float32),)
    else:
        acc = (tl.zeros([M, BLOCK_W * EACH], tl.float32),)
    peak = tl.full([P, M] if P > 1 else [M], float("-inf"), tl.float32)
    if DEFER and F.KEYS_FIRST:
        total = tl.zeros([P, 8, M] if P > 1 else [8, M], tl.float32)
    elif DEFER:
        total = tl.zeros([M, N], tl.float32)
    else:
        total = tl.zeros([M], tl.float32)
    # Weights times steps are 16-bit operands of the tensor cores. To keep them near 1 for any steps, the exponent of a
    # key's largest step, relative to that of the split's first key (0 if its step is 0), moves into the key's logit.
    common = tl.zeros([], tl.int32)
    if WEIGHED:
        first = first.to(tl.float32)
        common = tl.where(first == 0, 0, tl.minimum(_exponent(first), 60))
    state = (acc, peak, total, total, ahead)
    if F.BANDED or F.SHORT or (CODED and F.KEYS_FIRST):
        for new in range(begin, stop, N):
            state = _tile(state, queries, keys, values, extra, band, new, stop, limit, common, scale, softcap, F, True)
    else:
        full = begin + (stop - begin) // N * N
        for new in range(begin, full, N):
            state = _tile(state, queries, keys, values, extra, band, new, stop, limit, common, scale, softcap, F, False)
        if full < stop:
            state = _tile(state, queries, keys, values, extra, band, full, stop, limit, common, scale, softcap, F, True)
    acc, peak, total, shift, ahead = state
    if DEFER:
        total = tl.sum(total, len(total.shape) - 2 if F.KEYS_FIRST else 1)
        shift = tl.sum(shift, len(shift.shape) - 2 if F.KEYS_FIRST else 1)
    if CODED or F.BIAS:
        peak *= LN_2
    elif not F.SOFTCAP:
        peak *= scale
    ASSEMBLY: tl.constexpr = F.PACKED and F.KEYS_FIRST and F.D <= 128  # wider rows would spill
    there = live & tl.full(place.shape, 1, tl.int1)
    store_together(part_lse_ptr + place, (peak + tl.log(total),), there, ASSEMBLY)
    share = ((127 + common) << 23).to(tl.float32, bitcast=True) / tl.where(total == 0, 1.0, total)
    w = tl.arange(0, BLOCK_W)
    if F.KEYS_FIRST:
        if F.TURN_V:
            share *= 1.0 / (F.D & -F.D) ** 0.5
        whole = ()
        for part in tl.static_range(EACH):
            x = acc[part]
            if F.V_BITS < 16:  # before the share, which 2 ** 24 could take beyond float32
                x = x * 2.0 ** (16 + F.V_BITS + part * F.V_BITS % 8) + _of_queries(shift, F)
            whole += (x * _of_queries(share, F),)
        if F.TURN_V:
            whole = mix_parts(mix_words_of(whole, (F.D & -F.D) // EACH, dtype_of(F.TURN)))
        at = part_ptr + _of_queries(place, F).to(tl.int64) * F.D + (EACH * w)[:, None]
        store_together(at, whole, (w < W)[:, None] & _of_queries(there, F), ASSEMBLY)
    else:
        d = tl.arange(0, BLOCK_W * EACH)
        x = acc[0] * share[:, None]
        if CODED:
            x = out_of_pairs(x, EACH)
        if F.TURN_V:
            x = turn_rows(x, F.D, dtype_of(F.TURN))
        at_row = part_ptr + place[:, None].to(tl.int64) * F.D + d[None, :]
        tl.store(at_row, x, mask=live[:, None] & (d < F.D)[None, :])


@triton.jit
@no_type_check
def _of_keys(x, F: tl.constexpr):
    """A vector of keys, for tiles of keys and queries."""
    return tl.expand_dims(x, -1) if F.KEYS_FIRST else x[None, :]


@triton.jit
@no_type_check
def _of_queries(x, F: tl.constexpr):
    """A vector of query rows, for tiles of keys and queries, or of values and queries."""
    return tl.expand_dims(x, -2) if F.KEYS_FIRST else x[:, None]


@triton.jit
@no_type_check
def _load_ahead(keys, values, extra, at, stop, F: tl.constexpr):
    """Steps, zeros and biases of a tile: too narrow for asynchronous copies, they are loaded a tile ahead.

    They stay as they are stored, because a conversion would wait for them.
    """
    none = tl.zeros([1], tl.float32)
    k_step, k_zero, v_step, v_zero, bias = none, none, none, none, none
    CODED: tl.constexpr = F.K_BITS < 16 or F.V_BITS < 16
    TOGETHER: tl.constexpr = (
        CODED and not F.KEYS_FIRST and same(keys[1].dtype, keys[2].dtype, values[1].dtype, values[2].dtype)
    )
    if TOGETHER:
        k_step = load_together((keys[1], keys[2], values[1], values[2]), at, stop, F.SHORT, F.N)
    elif F.K_BITS < 16:
        k_step = load_vector(keys[1], at, stop, 0, F.D // F.K_GROUP, F.SHORT, F.N, F.PARTS)
        k_zero = load_vector(keys[2], at, stop, 0, F.D // F.K_GROUP, F.SHORT, F.N, F.PARTS)
    if F.V_BITS < 16 and not TOGETHER:
        v_step = load_vector(values[1], at, stop, 0, F.D // F.V_GROUP, F.SHORT, F.N, F.PARTS)
        v_zero = load_vector(values[2], at, stop, 0, F.D // F.V_GROUP, F.SHORT, F.N, F.PARTS)
    if F.BIAS:  # rows of 16 bits have no full last tile
        bias = load_vector(extra[2], at, stop, 0, 1, F.SHORT or not CODED, F.N, F.PARTS)
    return k_step, k_zero, v_step, v_zero, bias


@triton.jit
@no_type_check
def _tile(
    state, queries, keys, values, extra, band, new, stop, limit, common, scale, softcap, F: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Adds keys new:new + N to the running softmax. CUT: only those before `stop`."""
    N: tl.constexpr = F.N
    acc, peak, total, shift, ahead = state
    k_step, k_zero, v_step, v_zero, row_bias = ahead
    CODED: tl.constexpr = F.K_BITS < 16 or F.V_BITS < 16
    MASKED: tl.constexpr = F.SHORT if CODED else CUT
    WEIGHED: tl.constexpr = F.V_BITS < 16 and F.KEYS_FIRST
    LOG2: tl.constexpr = F.BIAS or (CODED and F.KEYS_FIRST)  # x is a logit in base 2; else x * unit is
    n = keys_of(N, F.PARTS)
    at = tl.minimum(new, limit) if CODED and CUT else new
    key = at + n
    bound = stop - at
    k = load_tile(keys[0], at, keys[3], bound, extra[3], extra[4],
                  F.D * F.K_BITS // 16, F.N, F.PAGE, MASKED, False, F.PARTS)  # fmt: skip
    if CODED:
        v = load_tile(values[0], at, values[3], bound, extra[3], extra[5],
                      F.D * F.V_BITS // 16, F.N, F.PAGE, MASKED, F.KEYS_FIRST, F.PARTS)  # fmt: skip
    if not F.KEYS_FIRST and len(k_step.shape) == 2:  # it is all four
        k_step, k_zero, v_step, v_zero = take_apart(k_step, F.PACKED and F.M > 64)  # 64 rows would spill
    k_step, k_zero = k_step.to(tl.float32), k_zero.to(tl.float32)
    v_step, v_zero = v_step.to(tl.float32), v_zero.to(tl.float32)
    if CODED or F.BIAS:
        ahead = _load_ahead(keys, values, extra, tl.minimum(new + F.N, limit), stop, F)
    if CODED and not F.KEYS_FIRST:  # here, not where they are used: operands of both products wait at one barrier
        v = expand_rows(v, v_step, v_zero, F.V_BITS, dtype_of(F.V_COMPUTE), F.PACKED)
    mark = tl.zeros(n.shape, tl.float32)  # what is added to the logits of a key
    if WEIGHED:
        Q: tl.constexpr = F.D // F.V_GROUP  # Triton 3.5 takes a range's end by name alone
        largest = v_step
        for part in tl.static_range(1, Q):
            other = load_vector(values[1], at, stop, part, Q, F.SHORT, F.N, F.PARTS)
            largest = tl.maximum(largest, other.to(tl.float32))
        exponent = _exponent(largest)
        above = tl.minimum(tl.maximum(exponent - common, -126), 126)
        up = ((127 - exponent) << 23).to(tl.float32, bitcast=True)  # 2 ** -exponent
        down = ((127 - above) << 23).to(tl.float32, bitcast=True)  # 2 ** -above
        mark = above.to(tl.float32)
    if F.BIAS:
        mark += row_bias.to(tl.float32) * LOG2_E
    if CODED and CUT:
        mark = tl.where((key >= new) & (key < stop), mark, float("-inf"))

    unit = LOG2_E if F.SOFTCAP else scale * LOG2_E
    if F.K_BITS < 16:
        if F.KEYS_FIRST:
            x = _logits_of_codes(k, k_step, k_zero, mark, queries, keys, at, stop, F)
        else:
            UNIT: tl.constexpr = 2.0**-16 if F.K_BITS == 2 else 2.0 ** (-16 - F.K_BITS)  # of products of q and codes
            unit = queries[3] * (1 / UNIT)
            code = join_codes(k, F.K_BITS, dtype_of(F.K_COMPUTE), F.PACKED)
            if tl.float32 == dtype_of(F.K_COMPUTE):  # interpreted bfloat16, where `codes` has half of them taken off
                k_zero += k_step * 2 ** (F.K_BITS - 1)
            x = product(queries[0], code) * k_step[None, :] + k_zero[None, :] * (queries[2] * UNIT)[:, None]
            if F.BIAS or F.SOFTCAP:
                x *= unit
        if F.SOFTCAP:
            if F.CHANNELS:
                x += _of_queries(queries[4] / softcap, F)
            x = tanh(x)
            unit = softcap * LOG2_E
            if LOG2:
                x *= unit
        if F.BIAS if not F.KEYS_FIRST else F.SOFTCAP or F.D != F.K_GROUP:
            x += _of_keys(mark, F)
        elif CUT and not F.KEYS_FIRST:
            x = tl.where((mark == 0)[None, :], x, float("-inf"))
    else:
        wide = k.to(dtype_of(F.K_COMPUTE))
        x = _product_of_keys(wide, tl.trans(queries), F) if F.KEYS_FIRST else product(queries, wide)
        if F.SOFTCAP:
            x = tanh(x * (scale / softcap)) * softcap
        if LOG2:
            x = x * unit + _of_keys(mark, F)
        if CUT and not CODED:
            x = tl.where(_of_keys(n < bound, F), x, float("-inf"))
    if F.BANDED:
        low, high = _of_queries(band[0], F), _of_queries(band[1], F)
        x = tl.where((_of_keys(key, F) >= low) & (_of_keys(key, F) < high), x, float("-inf"))
    new_peak = tl.max(x, len(x.shape) - 2 if F.KEYS_FIRST else 1)
    if CODED and not LOG2:
        new_peak *= unit
    new_peak = tl.maximum(peak, new_peak)
    if F.BANDED or F.PARTS > 1:  # a part of a short tile may have no key
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        floor = new_peak
    EXACT: tl.constexpr = tl.float32 == dtype_of(F.COMPUTE)
    lower = _of_queries(floor, F)
    if LOG2 or CODED:
        decay = exp2(peak - floor, EXACT)
        p = exp2(x - lower if LOG2 else x * unit - lower, EXACT)
    else:
        decay = exp2((peak - floor) * unit, EXACT)
        p = exp2((x - lower) * unit, EXACT)

    if WEIGHED:
        total = _add_sum(total, decay, p * _of_keys(down, F), F)
        acc, shift = _add_codes(acc, shift, decay, p, v, v_step, v_zero, up, values, at, stop, F)
    else:
        total = _add_sum(total, decay, p, F)
        if F.KEYS_FIRST:
            if not CODED:
                v = load_tile(values[0], at, values[3], bound, extra[3], extra[5],
                              F.D, F.N, F.PAGE, MASKED, True, F.PARTS)  # fmt: skip
            v, p = v.to(dtype_of(F.V_COMPUTE)), p.to(dtype_of(F.V_COMPUTE))
            acc = (add_product(acc[0] * _of_queries(decay, F), v, p),)
        else:
            if not CODED:
                v = load_tile(values[0], at, values[3], bound, extra[3], extra[5], F.D, F.N, F.PAGE, MASKED, False)
            acc = (add_product(acc[0] * decay[:, None], p.to(dtype_of(F.V_COMPUTE)), v.to(dtype_of(F.V_COMPUTE))),)
    return acc, new_peak, total, shift, ahead


@triton.jit
@no_type_check
def _logits_of_codes(k, step, zero, mark, queries, keys, at, stop, F: tl.constexpr):
    """Logits [N, M], or [PARTS, keys of each, M], in base 2 of keys as codes (divided by the softcap if there is one).

    `mark` is added if that is free: without a softcap and with one group.
    """
    M: tl.constexpr = F.M
    N: tl.constexpr = F.N
    rows, q_word, q_sum, unit, _ = queries
    EACH: tl.constexpr = 16 // F.K_BITS
    W: tl.constexpr = F.D // EACH
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    Q: tl.constexpr = F.D // F.K_GROUP
    TOP: tl.constexpr = F.K_BITS == 2
    UNIT: tl.constexpr = 2.0**-16 if TOP else 2.0 ** (-16 - F.K_BITS)  # of products of q and codes
    HALF: tl.constexpr = 2 ** (F.K_BITS - 1)
    CENTER: tl.constexpr = HALF if tl.float32 == dtype_of(F.K_COMPUTE) else 0  # what `codes` has subtracted
    w = tl.arange(0, BLOCK_W)
    P: tl.constexpr = F.PARTS
    KEYS: tl.constexpr = N // P
    none = tl.zeros([P, KEYS, M] if P > 1 else [N, M], tl.float32)
    x = none
    for group in tl.static_range(Q):
        inside = (w // (F.K_GROUP // EACH) == group)[:, None]
        if Q > 1:
            q_sum = tl.sum(tl.where(inside, q_word, 0), len(q_word.shape) - 2)
        if group > 0:
            step = load_vector(keys[1], at, stop, group, Q, F.SHORT, F.N, F.PARTS).to(tl.float32)
            zero = load_vector(keys[2], at, stop, group, Q, F.SHORT, F.N, F.PARTS).to(tl.float32)
        y = _of_queries(q_sum * ((CENTER - HALF) * UNIT), F) + none
        for part in tl.static_range(EACH):
            code = codes(k, part, F.K_BITS, dtype_of(F.K_COMPUTE), F.PACKED, TOP)
            q = rows[part]
            if Q > 1:
                q = tl.where(inside, q, 0).to(dtype_of(F.K_COMPUTE))
            if tl.float32 == dtype_of(F.K_COMPUTE):
                y = tl.fma(_product_of_keys(code, q, F), 1.0, y)
            else:
                y = tl.dot(code, _in_every_part(q, F), y)
        middle = _of_keys((zero + HALF * step) * unit, F) * _of_queries(q_sum, F)
        if Q == 1 and not F.SOFTCAP:
            middle += _of_keys(mark, F)
        x += y * _of_keys(step * (unit * (1 / UNIT)), F) + middle
    return x


@triton.jit
@no_type_check
def _add_codes(acc, shift, decay, p, v, step, zero, up, values, at, stop, F: tl.constexpr):
    """acc * decay + weighted codes, by word part, and shift * decay + weighted zeros."""
    EACH: tl.constexpr = 16 // F.V_BITS
    W: tl.constexpr = F.D // EACH
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    Q: tl.constexpr = F.D // F.V_GROUP
    CENTER: tl.constexpr = 2 ** (F.V_BITS - 1) if tl.float32 == dtype_of(F.V_COMPUTE) else 0
    w = tl.arange(0, BLOCK_W)
    sums = ()
    for part in tl.static_range(EACH):
        sums += (acc[part] * _of_queries(decay, F),)
    for group in tl.static_range(Q):
        if group > 0:
            step = load_vector(values[1], at, stop, group, Q, F.SHORT, F.N, F.PARTS).to(tl.float32)
            zero = load_vector(values[2], at, stop, group, Q, F.SHORT, F.N, F.PARTS).to(tl.float32)
        exact = p * _of_keys(step * up, F)
        weight = exact.to(dtype_of(F.V_COMPUTE))
        offset = p * _of_keys((zero + CENTER * step) * up, F)
        if F.TURN_V:  # a rounded weight is wrong by the same part of all codes, whose mean would come out as one value
            offset += (exact - weight.to(tl.float32)) * (0.5 * (2**F.V_BITS - 1) - CENTER)
        if Q == 1:
            shift = _add_sum(shift, decay, offset, F)
        else:
            offset = tl.sum(offset, len(offset.shape) - 2)
        added = ()
        for part in tl.static_range(EACH):
            code = codes(v, part, F.V_BITS, dtype_of(F.V_COMPUTE), F.PACKED, False)  # [BLOCK_W, N]
            if Q == 1:
                added += (add_product(sums[part], code, weight),)
            else:
                inside = (w // (F.V_GROUP // EACH) == group)[:, None]
                unit = 2.0 ** (16 + F.V_BITS + part * F.V_BITS % 8)
                more = tl.dot(code, weight, input_precision="ieee") + _of_queries(offset, F) * (1 / unit)
                added += (sums[part] + tl.where(inside, more, 0),)
        sums = added
    return sums, shift


@triton.jit
@no_type_check
def _add_sum(total, decay, x, F: tl.constexpr):
    """total * decay + the sum of x over keys. With few rows sums stay within a thread: added up after the loop."""
    M: tl.constexpr = F.M
    N: tl.constexpr = F.N
    if M > 16:
        return total * decay + tl.sum(x, 0 if F.KEYS_FIRST else 1)
    elif F.KEYS_FIRST:
        P: tl.constexpr = F.PARTS
        SUMS: tl.constexpr = N // P // 8
        eights = tl.sum(tl.reshape(x, [P, SUMS, 8, M] if P > 1 else [SUMS, 8, M]), 1 if P > 1 else 0)
        return total * _of_queries(decay, F) + eights
    else:
        return total * decay[:, None] + x


@triton.jit
@no_type_check
def _in_every_part(x, F: tl.constexpr):
    """x, [A, B], once for each part of the keys."""
    if F.PARTS > 1 and len(x.shape) == 2:
        return tl.broadcast_to(x[None], [F.PARTS, x.shape[0], x.shape[1]])
    else:
        return x


@triton.jit
@no_type_check
def _product_of_keys(rows, queries, F: tl.constexpr):
    """Rows of keys times queries, [W, M]."""
    P: tl.constexpr = F.PARTS
    KEYS: tl.constexpr = F.N // P
    if P == 1:
        return product(rows, tl.trans(queries))
    elif rows.dtype == tl.float32:
        flat = product(tl.reshape(rows, [F.N, queries.shape[0]]), tl.trans(queries))
        return tl.reshape(flat, [P, KEYS, F.M])
    else:
        return tl.dot(rows, _in_every_part(queries, F))


@triton.jit
@no_type_check
def _exponent(x):
    """The power of two below each x, at least -60."""
    return tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 127, -60)
