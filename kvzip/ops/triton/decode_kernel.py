"""The two kernels of decoding: attention over splits of contexts and tails, and the combination of partial results."""

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import LOG2_E, exp2, reserve
from kvzip.ops.triton.decode_load import prefetch_rows
from kvzip.ops.triton.decode_split import attend_split


class QueryArgs(NamedTuple):
    """Queries and their strides; how many tail rows each row sees; the order that brings a context's rows together."""

    q: Any
    stride_b: int
    stride_h: int
    stride_t: int
    lengths: Any
    order: Any


class ContextArgs(NamedTuple):
    """One context; or, of several, tensors of the same dtypes and a table of addresses in this order."""

    k: Any
    v: Any
    k_scale: Any
    k_zero: Any
    v_scale: Any
    v_zero: Any
    center: Any
    spread: Any
    bias: Any
    offsets: Any
    stride_k: int
    stride_v: int
    table: Any


class TailArgs(NamedTuple):
    """Tails: of question b, or in pages that `table` names, [sequences, pages_each]."""

    k: Any
    v: Any
    table: Any
    stride_kb: int
    stride_kh: int
    stride_kr: int
    stride_vb: int
    stride_vh: int
    stride_vr: int


class WorkArgs(NamedTuple):
    """What programs do. One context: its splits. Several: items made on the device, see `plan.Plan`."""

    items: Any
    tail_items: Any
    first: Any  # splits (items) first[h]:first[h + 1] are those of head h (of context and head)
    places: Any


ADDRESSES = tl.constexpr(10)  # of a context in a table
ITEM = tl.constexpr(6)  # numbers of an item: context or sequence, head, first row and end, first query row and end
PLACE = tl.constexpr(7)  # numbers of a query row: see `plan.Plan`
# Integers that change from call to call: a kernel specialized to one of them would be compiled anew.
_SIZES = ["rows", "heads", "count", "row_blocks", "tail_splits", "tail_blocks", "pitch", "tail_pitch"]
_VARYING = ["window", "tail_rows", "capacity", *_SIZES]


@triton.jit(do_not_specialize=_VARYING)
@no_type_check
def decode_kernel(
    query, context, tail, work, part_ptr, part_lse_ptr, scale, softcap, window, tokens,
    rows, heads, count, row_blocks, tail_splits, tail_blocks, pitch, tail_pitch, tail_rows, capacity,
    CONTEXT: tl.constexpr, TAIL: tl.constexpr, TAILED: tl.constexpr, LISTED: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr, RESERVED: tl.constexpr,
):  # fmt: skip
    """One program: CONTEXT.M query rows against one split of the context (count * row_blocks of them) or of a tail.

    LISTED: several contexts; a program's part is in a list that the device made, or it has none.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    reserve(RESERVED)
    item = tl.program_id(0)
    splits = count * row_blocks  # places of partial results of contexts
    if LISTED:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        of_context = item < splits
        at = tl.where(of_context, work.items.to(tl.int64), work.tail_items.to(tl.int64) - splits * (ITEM * 4))
        at = at.to(work.items.dtype) + item * ITEM
        which, head, begin = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        stop, row, row_stop = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
        if row < row_stop:  # else there are fewer items than programs
            if of_context:
                _attend_context(
                    query, context, part_ptr, part_lse_ptr, scale, softcap, window, tokens, item * pitch,
                    which, head, begin, stop, row, row_stop, CONTEXT, TAILED, True, False,
                )  # fmt: skip
            elif TAIL.PAGE > 0:
                _attend_tail(
                    query, tail, part_ptr, part_lse_ptr, scale, softcap, window, tokens, capacity,
                    splits * pitch + (item - splits) * tail_pitch,
                    which, head, begin, stop, row, row_stop, TAIL,
                )  # fmt: skip
    elif item < splits:
        at = work.items + item // row_blocks * 3
        _attend_context(
            query, context, part_ptr, part_lse_ptr, scale, softcap, window, tokens, item * pitch,
            0, tl.load(at), tl.load(at + 1), tl.load(at + 2), item % row_blocks * CONTEXT.M, rows,
            CONTEXT, TAILED, False, EARLY,
        )  # fmt: skip
    else:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        item -= splits
        block = item % tail_blocks
        begin = item // tail_blocks % tail_splits * tail_rows
        head = item // tail_blocks // tail_splits % heads
        question = item // tail_blocks // tail_splits // heads
        first = question * tokens * TAIL.G
        _attend_tail(
            query, tail, part_ptr, part_lse_ptr, scale, softcap, window, tokens, capacity,
            splits * pitch + item * tail_pitch,
            question, head, begin, begin + tail_rows, first + block * TAIL.M, first + tokens * TAIL.G, TAIL,
        )  # fmt: skip


@triton.jit
@no_type_check
def _attend_context(
    query, context, part_ptr, part_lse_ptr, scale, softcap, window, tokens, place,
    which, head, begin, stop, row, row_stop,
    F: tl.constexpr, TAILED: tl.constexpr, LISTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Query rows row:row_stop, counted within the order, over rows begin:stop of a context's head."""
    if LISTED:
        at = context.table + which.to(tl.int64) * ADDRESSES
        k = tl.multiple_of(tl.load(at).to(context.k.dtype), 16)
        v = tl.multiple_of(tl.load(at + 1).to(context.v.dtype), 16)
        k_scale = tl.multiple_of(tl.load(at + 2).to(context.k_scale.dtype), 16)
        k_zero = tl.multiple_of(tl.load(at + 3).to(context.k_zero.dtype), 16)
        v_scale = tl.multiple_of(tl.load(at + 4).to(context.v_scale.dtype), 16)
        v_zero = tl.multiple_of(tl.load(at + 5).to(context.v_zero.dtype), 16)
        center = tl.multiple_of(tl.load(at + 6).to(context.center.dtype), 16)
        spread = tl.multiple_of(tl.load(at + 7).to(context.spread.dtype), 16)
        bias = tl.multiple_of(tl.load(at + 8).to(context.bias.dtype), 16)
        offsets = tl.load(at + 9).to(context.offsets.dtype)
    else:
        k, v, bias, offsets = context.k, context.v, context.bias, context.offsets
        k_scale, k_zero, v_scale, v_zero = context.k_scale, context.k_zero, context.v_scale, context.v_zero
        center, spread = context.center, context.spread
    if EARLY:
        TWO_K: tl.constexpr = triton.next_power_of_2(2 * F.N * F.D * F.K_BITS // 8)
        TWO_V: tl.constexpr = triton.next_power_of_2(2 * F.N * F.D * F.V_BITS // 8)
        prefetch_rows(k, begin, stop, context.stride_k, TWO_K)
        prefetch_rows(v, begin, stop, context.stride_v, TWO_V)
        if F.BIAS:
            prefetch_rows(bias, begin, stop, 1, 4 * F.N)
        tl.extra.cuda.gdc_wait()
    M: tl.constexpr = F.M
    m = row + tl.arange(0, M)
    n = tl.minimum(m, row_stop - 1) // F.G
    if LISTED:
        n = tl.load(query.order + n)
    low = tl.zeros([M], tl.int32)
    high = low
    if F.BANDED:
        here = tl.load(offsets + head + 1) + n % tokens - tokens  # of the last token: -1
        if TAILED:
            here += tl.load(query.lengths + n // tokens)
        else:
            here += 1
        low = here - window + 1
        high = here + 1
        begin = tl.maximum(begin, tl.min(low, 0))
        stop = tl.maximum(begin, tl.minimum(stop, tl.max(high, 0)))
    attend_split(
        (_query_rows(query, n, tokens, head, m % F.G, F.G), m < row_stop),
        (k, k_scale, k_zero, context.stride_k),
        (v, v_scale, v_zero, context.stride_v),
        (center + head * F.D, spread + head * F.D, bias, query.order, 0, 0),
        (low, high),
        (part_ptr, part_lse_ptr, place + tl.arange(0, M)),
        begin, stop, scale, softcap, F,
    )  # fmt: skip


@triton.jit
@no_type_check
def _attend_tail(
    query, tail, part_ptr, part_lse_ptr, scale, softcap, window, tokens, capacity, place,
    which, head, begin, stop, row, row_stop, F: tl.constexpr,
):  # fmt: skip
    """Query rows row:row_stop over rows begin:stop of their own tail."""
    M: tl.constexpr = F.M
    m = row + tl.arange(0, M)
    n = tl.minimum(m, row_stop - 1) // F.G
    high = tl.load(query.lengths + n // tokens) + n % tokens - tokens + 1
    low = high - window if F.WINDOW else high * 0
    if F.PAGE == 0 or F.WINDOW:  # else items end where the longest tail does: their bounds need not wait for lengths
        begin = tl.maximum(begin, tl.min(low, 0))
        stop = tl.minimum(stop, tl.minimum(capacity, tl.max(high, 0)))
    live = m < row_stop
    at = place + tl.arange(0, M)
    if begin < stop:
        k, v = tail.k + head.to(tl.int64) * tail.stride_kh, tail.v + head.to(tl.int64) * tail.stride_vh
        table = tail.table
        if F.PAGE > 0:
            table += which.to(tl.int64) * (capacity // F.PAGE)
        else:
            k += which.to(tl.int64) * tail.stride_kb
            v += which.to(tl.int64) * tail.stride_vb
        attend_split(
            (_query_rows(query, n, tokens, head, m % F.G, F.G), live),
            (k, k, k, tail.stride_kr), (v, v, v, tail.stride_vr),
            (k, k, k, table, tail.stride_kb, tail.stride_vb),
            (low, high), (part_ptr, part_lse_ptr, at), begin, stop, scale, softcap, F,
        )  # fmt: skip
    else:
        tl.store(part_lse_ptr + at, tl.full([M], float("-inf"), tl.float32), mask=live)


@triton.jit
@no_type_check
def _query_rows(query, n, tokens, head, g, G: tl.constexpr):
    """Addresses of the first values of query rows: token n % tokens of question n // tokens, query head g of a head."""
    b, t = (n // tokens).to(tl.int64), (n % tokens).to(tl.int64)
    return query.q + b * query.stride_b + (head * G + g).to(tl.int64) * query.stride_h + t * query.stride_t


@triton.jit(do_not_specialize=["tokens", *_SIZES])
@no_type_check
def combine_kernel(
    query, context, work, part_ptr, part_lse_ptr, out_ptr, lse_ptr, scale, tokens,
    rows, heads, count, row_blocks, tail_splits, tail_blocks, pitch, tail_pitch,
    CONTEXT: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    LISTED: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of one head, their partial results weighted by their log-sum-exp, BLOCK_P at a time."""
    G: tl.constexpr = CONTEXT.G
    D: tl.constexpr = CONTEXT.D
    M: tl.constexpr = CONTEXT.M
    TAIL_M: tl.constexpr = TAIL.M
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    CENTERED: tl.constexpr = CONTEXT.CHANNELS and not CONTEXT.SOFTCAP  # scale * q . center is not in the logits yet
    ONE: tl.constexpr = BLOCK_R == 1
    head = tl.program_id(1)
    r = tl.program_id(0) if ONE else tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = r if ONE else tl.minimum(r, rows - 1)
    n, g = row // G, row % G
    c = tl.arange(0, triton.next_power_of_2(D))
    if LISTED:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        at = work.places + n * PLACE
        which, within, own = tl.load(at), tl.load(at + 1) * G + g, tl.load(at + 4) * G + g
        blocks, own_splits, own_blocks = tl.load(at + 2), tl.load(at + 5), tl.load(at + 6)
        tail_first = tl.load(at + 3) + head * own_splits * own_blocks
        split = work.first + tl.maximum(which, 0) * heads + head
        first = tl.load(split)
        splits = tl.where(which < 0, 0, (tl.load(split + 1) - first) // blocks)
        if CENTERED:
            center_at = context.table + tl.maximum(which, 0).to(tl.int64) * ADDRESSES + 6
            center = _column(tl.load(center_at).to(context.center.dtype), ONE) + head * D + c
            center = tl.load(center, mask=c < _column(tl.where(which < 0, 0, D), ONE), other=0)
    else:
        within, own, blocks = row, row % (tokens * G), row_blocks
        own_splits, own_blocks = row * 0 + tail_splits, tail_blocks
        tail_first = (n // tokens * heads + head) * tail_splits * tail_blocks
        first = tl.load(work.first + head)
        splits = row * 0 + tl.load(work.first + head + 1) - first
        first *= row_blocks
        if CENTERED:
            center = tl.load(context.center + head * D + c, mask=c < D, other=0)
    b, t = n // tokens, n % tokens
    context_at = _line((first + within // M) * pitch + within % M, ONE)
    tail_at = count * row_blocks * pitch + (tail_first + own // TAIL_M) * tail_pitch + own % TAIL_M
    context_step, tail_step = row * 0 + blocks * pitch, row * 0 + own_blocks * tail_pitch
    tail_at = _line(tail_at - splits * tail_step, ONE)
    results = splits + own_splits
    longest = results if ONE else tl.max(results, 0)
    splits, results = _line(splits, ONE), _line(results, ONE)
    context_step, tail_step = _line(context_step, ONE), _line(tail_step, ONE)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    if not LISTED:  # nothing above needs the kernel before
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
    shift = 0.0
    if CENTERED:
        q_row = query.q + b.to(tl.int64) * query.stride_b + (head * G + g).to(tl.int64) * query.stride_h
        q = tl.load(_column(q_row + t.to(tl.int64) * query.stride_t, ONE) + c, mask=c < D, other=0)
        shift = _line(tl.sum(q.to(tl.float32) * center, 0 if ONE else 1) * scale, ONE)
    if ONE:
        acc = tl.zeros([BLOCK_D], tl.float32)
        peak = tl.full([], float("-inf"), tl.float32)
    else:
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.where(peak == 0, 1.0, 0.0)
    for at in range(0, longest, BLOCK_P):
        i = _column(at + tl.arange(0, BLOCK_P), ONE)  # [BLOCK_P] or [BLOCK_P, BLOCK_R] from here
        of_context, live = i < splits, i < results
        place = tl.where(of_context, context_at + i * context_step, tail_at + i * tail_step)
        lse = tl.load(part_lse_ptr + place, mask=live, other=float("-inf"))
        if CENTERED:
            lse += tl.where(of_context, shift, 0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = exp2((lse - _line(floor, ONE)) * LOG2_E, EXACT)
        # a split without visible keys leaves its part unset
        set_here = _deep(live & (lse != float("-inf")), ONE) & (d < D)
        part = tl.load(part_ptr + _deep(place, ONE).to(tl.int64) * D + d, mask=_deep(live, ONE) & (d < D), other=0)
        part = tl.where(set_here, part, 0)
        decay = exp2((peak - floor) * LOG2_E, EXACT)
        acc = acc * (decay if ONE else decay[:, None]) + tl.sum(_deep(weight, ONE) * part, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak
    place = (b.to(tl.int64) * heads * G + head * G + g) * tokens + t
    whole = tl.where(total == 0, 1.0, total)
    acc = acc / (whole if ONE else whole[:, None])
    out = out_ptr + (place if ONE else place[:, None]) * D + d
    if ONE:
        there = d < D
    else:
        there = (r < rows)[:, None] & (d < D)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=there)
    tl.store(lse_ptr + place, peak + tl.log(total), mask=r < tl.where(tl.program_id(2) == 0, rows, 0))


@triton.jit
@no_type_check
def _line(x, ONE: tl.constexpr):
    """Numbers of rows beside partial results: a scalar of the ONE row, or [1, BLOCK_R]."""
    return x if ONE else x[None, :]


@triton.jit
@no_type_check
def _column(x, ONE: tl.constexpr):
    """Numbers of the first axis with one more after it, if there is more than ONE row."""
    return x if ONE else x[:, None]


@triton.jit
@no_type_check
def _deep(x, ONE: tl.constexpr):
    """Numbers of partial results beside columns: [BLOCK_P, 1] of the ONE row, or [BLOCK_P, BLOCK_R, 1]."""
    return x[:, None] if ONE else x[:, :, None]
