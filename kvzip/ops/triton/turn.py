"""Turning rows in kernels by the Hadamard matrix of `kvzip.ops.turning`, whose entries are computed, not loaded.

The index of a value is split: d = EACH * w + part. The matrix is then one of parts times one of w, so that rows which
lie in parts are turned by small products, each part's alone, and by adding and subtracting parts.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def signs(row, column, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """1 or -1 where row and column are in the same block of BLOCK, by the bits that both have, and 0 elsewhere."""
    both = row & column & (BLOCK - 1)
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return tl.where(row // BLOCK == column // BLOCK, 1 - 2 * (both & 1), 0).to(DTYPE)


@triton.jit
@no_type_check
def turn_rows(x, D: tl.constexpr, DTYPE: tl.constexpr):
    """Turns rows of D values, at most 128, [M, BLOCK_D]; what is at and after D is 0 or not used. DTYPE as below."""
    M: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    BLOCK: tl.constexpr = D & -D
    # A larger matrix would take too many registers. Triton 3.5 takes `min` of constants for an operation.
    C: tl.constexpr = 16 if BLOCK < 16 else 64 if BLOCK > 64 else BLOCK
    c = tl.arange(0, C)
    matrix = signs(c[:, None], c[None, :], BLOCK if BLOCK < C else C, DTYPE)
    x = tl.reshape(x, [M * WIDTH // C, C])
    high = x.to(DTYPE)
    y = tl.dot(high, matrix, input_precision="ieee")
    if DTYPE != tl.float32:  # noqa: SIM300
        y = tl.dot((x - high.to(tl.float32)).to(DTYPE), matrix, y)
    y *= 1.0 / BLOCK**0.5
    if BLOCK > C:
        first, second = tl.split(tl.permute(tl.reshape(y, [M, 2, C]), [0, 2, 1]))
        y = tl.permute(tl.join(first + second, first - second), [0, 2, 1])
    return tl.reshape(y, [M, WIDTH])


@triton.jit
@no_type_check
def turn_columns(parts, D: tl.constexpr, EACH: tl.constexpr, DTYPE: tl.constexpr):
    """Turns columns of D values in EACH parts, each [BLOCK_W, M], where what is at and after D is 0 or not used.

    Products are of DTYPE: of float32, or of bfloat16 and what that loses, which are exact to 2 ** -16.
    """
    BLOCK: tl.constexpr = D & -D
    BLOCK_W: tl.constexpr = parts[0].shape[0]
    w = tl.arange(0, BLOCK_W)
    matrix = signs(w[:, None], w[None, :], BLOCK // EACH, DTYPE)
    mixed = ()
    for part in tl.static_range(EACH):
        high = parts[part].to(DTYPE)
        x = tl.dot(matrix, high, input_precision="ieee")
        if DTYPE != tl.float32:  # noqa: SIM300
            x = tl.dot(matrix, (parts[part] - high.to(tl.float32)).to(DTYPE), x)
        mixed += (x,)
    turned = ()
    for i in tl.static_range(EACH):
        x = mixed[0]
        for j in tl.static_range(1, EACH):
            x = _added(x, mixed[j], i & j)
        turned += (x * (1.0 / BLOCK**0.5),)
    return turned


@triton.jit
@no_type_check
def mix_blocks(blocks, D: tl.constexpr, C: tl.constexpr):
    """What is left to do of turning once each block of C values was turned: sums and differences of pairs of blocks."""
    BLOCK: tl.constexpr = D & -D
    R: tl.constexpr = BLOCK // C if BLOCK > C else 1
    for power in tl.static_range(R.bit_length() - 1):
        mixed = ()
        for j in tl.static_range((D + C - 1) // C):
            if j >> power & 1:
                mixed += (blocks[j ^ (1 << power)] - blocks[j],)
            else:
                mixed += (blocks[j] + blocks[j ^ (1 << power)],)
        blocks = mixed
    turned = ()
    for j in tl.static_range((D + C - 1) // C):
        turned += (blocks[j] * (1.0 / BLOCK**0.5),)
    return turned


@triton.jit
@no_type_check
def _added(x, y, BITS: tl.constexpr):
    """x + y, or x - y where BITS, below 64, has an odd number of bits."""
    if (BITS ^ (BITS >> 1) ^ (BITS >> 2) ^ (BITS >> 3) ^ (BITS >> 4) ^ (BITS >> 5)) & 1:
        return x - y
    else:
        return x + y
