"""The first kernel of decoding: attention over splits of contexts and of tails, each a partial result."""

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import reserve
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
    """What programs do. One context: its splits. Several: items made on the device, see `decode_plan.Plan`."""

    items: Any
    tail_items: Any
    first: Any  # splits (items) first[h]:first[h + 1] are those of head h (of context and head)
    places: Any


ADDRESSES = tl.constexpr(10)  # of a context in a table
ITEM = tl.constexpr(6)  # numbers of an item: context or sequence, head, first row and end, first query row and end
# Integers that change from call to call: a kernel specialized to one of them would be compiled anew.
SIZES = ["rows", "heads", "count", "row_blocks", "tail_splits", "tail_blocks", "pitch", "tail_pitch"]
_VARYING = ["window", "tail_rows", "capacity", *SIZES]


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
                    query, context, part_ptr, part_lse_ptr, scale, softcap, window, tokens, item * pitch, pitch,
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
            query, context, part_ptr, part_lse_ptr, scale, softcap, window, tokens, item * pitch, pitch,
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
    query, context, part_ptr, part_lse_ptr, scale, softcap, window, tokens, place, pitch,
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
        begin = tl.minimum(tl.maximum(begin, tl.min(low, 0)), stop)  # within the context: steps are read from there
        stop = tl.maximum(begin, tl.minimum(stop, tl.max(high, 0)))
    at = place + tl.arange(0, M)
    if F.PARTS > 1:
        at = tl.arange(0, F.PARTS)[:, None] * (pitch // F.PARTS) + at[None, :]
    attend_split(
        (_query_rows(query, n, tokens, head, m % F.G, F.G), m < row_stop),
        (k, k_scale, k_zero, context.stride_k),
        (v, v_scale, v_zero, context.stride_v),
        (center + head * F.D, spread + head * F.D, bias, query.order, 0, 0),
        (low, high),
        (part_ptr, part_lse_ptr, at),
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
