"""The second kernel of decoding: a row's partial results, of its context and of its tail, become its attention."""

from typing import no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import LOG2_E, exp2
from kvzip.ops.triton.decode_kernel import ADDRESSES, SIZES

PLACE = tl.constexpr(7)  # numbers of a query row: see `decode_plan.Plan`


@triton.jit(do_not_specialize=["tokens", *SIZES])
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
    PARTS: tl.constexpr = CONTEXT.PARTS
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
    splits *= PARTS
    tail_at = _line(tail_at - splits * tail_step, ONE)
    results = splits + own_splits
    longest = results if ONE else tl.max(results, 0)
    splits, results = _line(splits, ONE), _line(results, ONE)
    context_step, tail_step = _line(context_step, ONE), _line(tail_step, ONE)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    q_row = query.q + b.to(tl.int64) * query.stride_b + (head * G + g).to(tl.int64) * query.stride_h
    q_at = _column(q_row + t.to(tl.int64) * query.stride_t, ONE) + c
    bounds = splits, results
    starts = context_at, context_step, tail_at, tail_step, pitch
    i = _column(tl.arange(0, BLOCK_P), ONE)  # [BLOCK_P] or [BLOCK_P, BLOCK_R]
    place = _places(i, bounds, starts, PARTS)
    if not LISTED:  # nothing above needs the kernel before
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
    shift = 0.0
    if CENTERED:
        q = tl.load(q_at, mask=c < D, other=0)
    lse, part = _load(part_ptr, part_lse_ptr, i, place, d, bounds, D, ONE)
    if CENTERED:
        shift = _line(tl.sum(q.to(tl.float32) * center, 0 if ONE else 1) * scale, ONE)
    if ONE:
        acc = tl.zeros([BLOCK_D], tl.float32)
        peak = tl.full([], float("-inf"), tl.float32)
    else:
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    state = acc, peak, tl.where(peak == 0, 1.0, 0.0)
    state = _add(state, lse, part, shift, i, d, bounds, D, CENTERED, ONE, EXACT)
    for at in range(BLOCK_P, longest, BLOCK_P):
        i = _column(at + tl.arange(0, BLOCK_P), ONE)
        lse, part = _load(part_ptr, part_lse_ptr, i, _places(i, bounds, starts, PARTS), d, bounds, D, ONE)
        state = _add(state, lse, part, shift, i, d, bounds, D, CENTERED, ONE, EXACT)
    acc, peak, total = state
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
def _places(i, bounds, starts, PARTS: tl.constexpr):
    """Where partial results i of rows are: those of the context's splits, PARTS of each, then those of the tail."""
    context_at, context_step, tail_at, tail_step, pitch = starts
    of_context = context_at + i // PARTS * context_step + i % PARTS * (pitch // PARTS)
    return tl.where(i < bounds[0], of_context, tail_at + i * tail_step)


@triton.jit
@no_type_check
def _load(part_ptr, lse_ptr, i, place, d, bounds, D: tl.constexpr, ONE: tl.constexpr):
    live = i < bounds[1]
    lse = tl.load(lse_ptr + place, mask=live, other=float("-inf"))
    part = tl.load(part_ptr + _deep(place, ONE).to(tl.int64) * D + d, mask=_deep(live, ONE) & (d < D), other=0)
    return lse, part


@triton.jit
@no_type_check
def _add(
    state, lse, part, shift, i, d, bounds, D: tl.constexpr, CENTERED: tl.constexpr, ONE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Adds partial results i to rows' sums of them, their peaks and totals."""
    acc, peak, total = state
    if CENTERED:
        lse += tl.where(i < bounds[0], shift, 0.0)
    new_peak = tl.maximum(peak, tl.max(lse, 0))
    floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = exp2((lse - _line(floor, ONE)) * LOG2_E, EXACT)
    # a split without visible keys leaves its part unset
    part = tl.where(_deep(lse != float("-inf"), ONE) & (d < D), part, 0)
    decay = exp2((peak - floor) * LOG2_E, EXACT)
    acc = acc * (decay if ONE else decay[:, None]) + tl.sum(_deep(weight, ONE) * part, 0)
    return acc, new_peak, total * decay + tl.sum(weight, 0)


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
