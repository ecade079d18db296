"""Exact selection by narrowing a range of keys, without a host sync and without a sort.

A score's key is its float bits mapped to uint32 so that keys order as scores do (-0.0 as 0.0, NaN as -inf). The
count-th highest key is found in rounds: count the keys of the range by 2**13 bins, and those above it; the bin that
holds the count-th is the next range. The first round looks at a sample and guesses a range around the rank. A later
round that finds the rank outside turns to the part above or below, so a bad guess costs time and never exactness.
At most four rounds after the guess leave a single key, usually two; the launches after that return at once.

Each step is a function over [P, n], P problems of n scores: `select` is one problem, `select_uniform` one for each
head. Heads divided over devices take the same steps: they add up the histograms before `narrow_`, and count the ties in
front of a block over all parts:

    state = begin(P, device)
    five times:  counts = histogram(scores, state, ...);  (add over parts);  narrow_(state, counts, ...)
    keep, ties = mark(scores, state);  (gather ties);  settle_(keep, scores, state, ties, ties_before, ...)

Bytes: the scores are read three times as a rule (two rounds and `mark`), five at most, and the mask is written once;
about 30 integer operations a score and round. Measured: docs/tuning.md.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float32, Int32, Int64
from torch import Tensor

from kvzip.ops.triton.common import on_device

BINS = tl.constexpr(2**13)
COLUMNS = tl.constexpr(128)  # bins of a row: the histogram is searched by rows first, then in one row
BLOCK, WARPS = 4096, 8  # scores of one program, and its warps: the fastest of those tried
FULL_ROUNDS = 4
BELOW, BEYOND, ABOVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # columns of a state, see `begin`


def select_rows_triton(
    scores: Float32[Tensor, "P n"], *, count: int, nan: Int32[Tensor, " 1"] | None = None
) -> Bool[Tensor, "P n"]:
    problems, n = scores.shape
    if scores.numel() == 0:
        return torch.empty(problems, n, dtype=torch.bool, device=scores.device)
    scores = scores.contiguous()
    state = begin(problems, scores.device)
    narrow_(state, histogram(scores, state, step=sample_step(problems, n)), count=count, total=n, guess=True)
    for index in range(FULL_ROUNDS):
        counts = histogram(scores, state, nan=nan if index == 0 else None)
        narrow_(state, counts, count=count, total=n)
    keep, ties = mark(scores, state)
    settle_(keep, scores, state, ties, ties.cumsum(1) - ties, count=count)
    return keep


def begin(problems: int, device: torch.device) -> Int64[Tensor, "P 3"]:
    """The state of P selections before the first round.

    Its columns: how many keys below the range are excluded, how many above it, how many scores lie above it.
    """
    return torch.zeros(problems, 3, dtype=torch.int64, device=device)


def sample_step(problems: int, n: int) -> int:
    """Every how many-th score the sample takes: 2**16 in all, and 2**10 of each problem if it has them.

    It is odd, so that the sample walks through all columns of heads whose length is a power of two.
    """
    return n // max(2**16 // problems, 2**10) | 1


@on_device
def histogram(
    scores: Float32[Tensor, "P n"],
    state: Int64[Tensor, "P 3"],
    *,
    step: int = 1,
    nan: Int32[Tensor, " 1"] | None = None,
) -> Int64[Tensor, "P bins"]:
    """How many keys of every step-th score lie in each bin of the range and, in the last column, above the range.

    Sets `nan` to 1 if a score is NaN. All zero where the range is one key already.
    """
    problems, n = scores.shape
    counts = torch.zeros(problems, BINS.value + 1, dtype=torch.int64, device=scores.device)
    seen = triton.cdiv(n, step)
    block, warps = (BLOCK, WARPS) if step == 1 else (512, 4)  # a sample of 2**16 makes 128 programs: one per SM
    blocks = triton.cdiv(seen, block)
    _histogram_kernel[(problems * blocks,)](
        scores, state, counts, nan, n, seen, step, blocks, state.stride(0), BLOCK=block, num_warps=warps
    )
    return counts


@on_device
def narrow_(
    state: Int64[Tensor, "P 3"], counts: Int64[Tensor, "P bins"], *, count: int, total: int, guess: bool = False
) -> None:
    """Narrows each range to the bin that holds the count-th highest key, or moves it to where that key must be.

    Args:
        counts: from `histogram`, added up over all parts.
        total: scores of a problem, over all parts.
        guess: the counts are those of a sample; the new range takes a margin on both sides of the rank.
    """
    _narrow_kernel[(len(state),)](state, counts, count, total, GUESS=guess, num_warps=16)


@on_device
def mark(
    scores: Float32[Tensor, "P n"], state: Int64[Tensor, "P 3"]
) -> tuple[Bool[Tensor, "P n"], Int64[Tensor, "P blocks"]]:
    """Marks the scores above the key that the rounds found, and counts those equal to it in each block.

    The state may be one row expanded to P parts of a problem.
    """
    problems, n = scores.shape
    blocks = triton.cdiv(n, BLOCK)
    keep = torch.empty(problems, n, dtype=torch.bool, device=scores.device)
    ties = torch.empty(problems, blocks, dtype=torch.int64, device=scores.device)
    _mark_kernel[(problems * blocks,)](
        scores, state, keep.view(torch.uint8), ties, n, blocks, state.stride(0), BLOCK=BLOCK, num_warps=WARPS
    )
    return keep, ties


@on_device
def settle_(
    keep: Bool[Tensor, "P n"],
    scores: Float32[Tensor, "P n"],
    state: Int64[Tensor, "P 3"],
    ties: Int64[Tensor, "P blocks"],
    ties_before: Int64[Tensor, "P blocks"],
    *,
    count: int,
) -> None:
    """Marks as many of the equal scores, in index order, as the count leaves room for.

    Args:
        ties_before: how many equal scores come before each block in index order, over all parts.
    """
    problems, n = scores.shape
    blocks = triton.cdiv(n, BLOCK)
    _settle_kernel[(problems * blocks,)](
        scores, state, keep.view(torch.uint8), ties, ties_before, count, n, blocks, state.stride(0), BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
@no_type_check
def _key(scores):
    """uint32 keys in the order of the scores."""
    scores = tl.where(scores == scores, scores, float("-inf"))
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
@no_type_check
def _range(state_ptr):
    """The lowest and highest key of the range."""
    return tl.load(state_ptr + BELOW), 0xFFFFFFFF - tl.load(state_ptr + BEYOND)


@triton.jit
@no_type_check
def _shift(low, high):
    """The shift that divides the range into at most BINS bins."""
    return tl.sum(((high - low) >> tl.arange(0, 32) >= BINS).to(tl.int32))


@triton.jit
@no_type_check
def _histogram_kernel(
    scores_ptr, state_ptr, counts_ptr, nan_ptr, n, seen, step, blocks, stride_state, BLOCK: tl.constexpr
):
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    low, high = _range(state_ptr + problem * stride_state)
    if low == high and nan_ptr is None:
        return
    index = block * BLOCK + tl.arange(0, BLOCK)
    valid = index < seen
    scores = tl.load(scores_ptr + problem * n + index * step, mask=valid, other=0.0)  # [BLOCK]
    if nan_ptr is not None and tl.max((scores != scores).to(tl.int32)) > 0:
        tl.store(nan_ptr, 1)

    keys = _key(scores)
    inside = valid & (keys >= low.to(tl.uint32)) & (keys <= high.to(tl.uint32))
    above = valid & (keys > high.to(tl.uint32))
    both = tl.sum((inside.to(tl.int32) << 16) + above.to(tl.int32))  # one reduction: BLOCK < 2**15
    number, over = both >> 16, both & 0xFFFF
    counts_ptr += problem * (BINS + 1)
    tl.atomic_add(counts_ptr + BINS, over.to(tl.int64), mask=over > 0, sem="relaxed")
    if number == 0:
        return
    bins = ((keys - low.to(tl.uint32)) >> _shift(low, high).to(tl.uint32)).to(tl.int32)
    if number > BLOCK // 16:
        # Atomics of many equal scores would serialize on one bin: the lowest and highest bin are summed first.
        first = tl.min(tl.where(inside, bins, BINS))
        last = tl.max(tl.where(inside, bins, -1))
        in_first = tl.sum((inside & (bins == first)).to(tl.int32))
        in_last = tl.sum((inside & (bins == last)).to(tl.int32))
        tl.atomic_add(counts_ptr + first, in_first.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + last, in_last.to(tl.int64), mask=last > first, sem="relaxed")
        inside = inside & (bins != first) & (bins != last)
    tl.atomic_add(counts_ptr + bins, tl.full([BLOCK], 1, tl.int64), mask=inside, sem="relaxed")


@triton.jit
@no_type_check
def _narrow_kernel(state_ptr, counts_ptr, count, total, GUESS: tl.constexpr):
    problem = tl.program_id(0).to(tl.int64)
    state_ptr += problem * 3
    low, high = _range(state_ptr)
    if low == high:
        return
    shift = _shift(low, high)
    counts_ptr += problem * (BINS + 1)
    above = tl.load(counts_ptr + BINS)
    tile = tl.arange(0, BINS // COLUMNS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.cumsum(tl.sum(tl.load(counts_ptr + tile), axis=1), reverse=True)  # [BINS / COLUMNS], from each row on
    inside = tl.max(rows)
    if GUESS:
        rank = (count * inside) // total
        margin = inside // 128 + (2 * tl.sqrt(inside.to(tl.float32))).to(tl.int64)
        last, _ = _find(counts_ptr, rows, rank - margin)
        first, _ = _find(counts_ptr, rows, tl.minimum(rank + margin, inside))
        tl.store(state_ptr + BELOW, first << shift)
        tl.store(state_ptr + BEYOND, 0xFFFFFFFF - ((last + 1) << shift) + 1)
    elif above > 0 and above >= count:
        tl.store(state_ptr + BELOW, high + 1)
        tl.store(state_ptr + BEYOND, 0)
    elif above + inside < count:
        tl.store(state_ptr + BELOW, 0)
        tl.store(state_ptr + BEYOND, 0xFFFFFFFF - low + 1)
        tl.store(state_ptr + ABOVE, above + inside)
    else:
        bin, over = _find(counts_ptr, rows, count - above)
        low += tl.minimum(bin, (high - low) >> shift) << shift  # for a count of 0 the last bin, beyond the range or not
        high = tl.minimum(high, low + (1 << shift.to(tl.int64)) - 1)
        tl.store(state_ptr + BELOW, low)
        tl.store(state_ptr + BEYOND, 0xFFFFFFFF - high)
        tl.store(state_ptr + ABOVE, above + over)


@triton.jit
@no_type_check
def _find(counts_ptr, rows, wanted):
    """The last bin such that it and the bins above hold `wanted` counts, and the counts of the bins above."""
    row = tl.sum((rows >= wanted).to(tl.int64)) - 1
    over = tl.max(tl.where(tl.arange(0, BINS // COLUMNS) > row, rows, 0))
    columns = tl.arange(0, COLUMNS)
    from_here = over + tl.cumsum(tl.load(counts_ptr + row * COLUMNS + columns), reverse=True)  # [COLUMNS]
    column = tl.sum((from_here >= wanted).to(tl.int64)) - 1
    return row * COLUMNS + column, tl.max(tl.where(columns > column, from_here, over))


@triton.jit
@no_type_check
def _mark_kernel(scores_ptr, state_ptr, keep_ptr, ties_ptr, n, blocks, stride_state, BLOCK: tl.constexpr):
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    threshold = tl.load(state_ptr + problem * stride_state + BELOW).to(tl.uint32)
    index = block * BLOCK + tl.arange(0, BLOCK)
    valid = index < n
    keys = _key(tl.load(scores_ptr + problem * n + index, mask=valid, other=0.0))  # [BLOCK]
    tl.store(keep_ptr + problem * n + index, (keys > threshold).to(tl.uint8), mask=valid)
    tl.store(ties_ptr + problem * blocks + block, tl.sum((valid & (keys == threshold)).to(tl.int32)).to(tl.int64))


@triton.jit
@no_type_check
def _settle_kernel(
    scores_ptr, state_ptr, keep_ptr, ties_ptr, before_ptr, count, n, blocks, stride_state, BLOCK: tl.constexpr
):
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    ties = tl.load(ties_ptr + problem * blocks + block)
    before = tl.load(before_ptr + problem * blocks + block)
    room = count - tl.load(state_ptr + problem * stride_state + ABOVE) - before
    if ties == 0 or room <= 0:
        return
    threshold = tl.load(state_ptr + problem * stride_state + BELOW).to(tl.uint32)
    index = block * BLOCK + tl.arange(0, BLOCK)
    valid = index < n
    keys = _key(tl.load(scores_ptr + problem * n + index, mask=valid, other=0.0))  # [BLOCK]
    tied = valid & (keys == threshold)
    rank = tl.cumsum(tied.to(tl.int32))
    tl.store(keep_ptr + problem * n + index, tl.full([BLOCK], 1, tl.uint8), mask=tied & (rank <= room))
