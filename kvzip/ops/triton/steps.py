"""Steps in kernels: zeros and scales of rows that lie in tiles of columns, and the codes of their values."""

from typing import no_type_check

import triton
import triton.language as tl

ROUND = tl.constexpr(1.5 * 2**23)  # of numbers around it the lowest bit counts ones


@triton.jit
@no_type_check
def grid(
    turned, D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, NARROW: tl.constexpr, FINE: tl.constexpr,
    C: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Zeros and scales of each group as they are stored, and of which rows they are too coarse."""
    LAST: tl.constexpr = 2**BITS - 1
    ROWS: tl.constexpr = turned[0].shape[0]
    c = tl.arange(0, C)
    zeros = ()
    scales = ()
    coarse = tl.zeros([ROWS], tl.int32) > 0
    for g in tl.static_range(D // GROUP):
        low = tl.full([ROWS], float("inf"), tl.float32)
        high = tl.full([ROWS], float("-inf"), tl.float32)
        for j in tl.static_range((D + C - 1) // C):
            if j * C // GROUP == g:
                own = (j * C + c < D)[None, :]
                low = tl.minimum(low, tl.min(tl.where(own, turned[j], float("inf")), 1))
                high = tl.maximum(high, tl.max(tl.where(own, turned[j], float("-inf")), 1))
        span = (high - low) * NARROW
        exact = low
        if NARROW < 1:
            exact = (low + high - span) * 0.5
        step = tl.div_rn(span, tl.full([ROWS], LAST, tl.float32))
        zero, scale = exact.to(STORED), step.to(STORED)
        most = tl.maximum(step * 0.5, FINE)
        held = tl.abs(zero.to(tl.float32) - exact) <= most
        held &= tl.abs(scale.to(tl.float32) - step) * LAST <= most
        coarse |= ~held
        zeros += (zero,)
        scales += (scale,)
    return zeros, scales, coarse


@triton.jit
@no_type_check
def reciprocal(scale):
    """What values are multiplied by to be in steps; 0 where the scale is 0, so that all codes are."""
    safe = tl.where(scale > 0, tl.maximum(scale, 2.0**-126), 1.0)  # of what is below, the reciprocal overflows
    return tl.where(scale > 0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), safe), 0.0)


@triton.jit
@no_type_check
def rounded(x, zero, each, BITS: tl.constexpr):
    """Codes of values [n, C] plus ROUND: adding that rounds to whole numbers, and the lowest bits are then the code."""
    LAST: tl.constexpr = 2**BITS - 1
    return tl.minimum(tl.maximum((x - zero) * each, 0.0), LAST) + ROUND
