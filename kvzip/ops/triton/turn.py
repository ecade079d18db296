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
    if BLOCK > 32:
        both = (both ^ (both >> 5)) & 31
    odd = (tl.full([], 0x96696996, tl.uint32) >> both) & 1  # bit i: whether i, below 32, has an odd number of bits
    return tl.where(row // BLOCK == column // BLOCK, tl.where(odd == 1, -1.0, 1.0), 0.0).to(DTYPE)


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
    low = (x - high.to(tl.float32)).to(DTYPE)  # before the first product, which would keep x in registers
    y = tl.dot(high, matrix, input_precision="ieee")
    EXACT: tl.constexpr = tl.float32 == DTYPE
    if not EXACT:
        y = tl.dot(low, matrix, y)
    y *= 1.0 / BLOCK**0.5
    if BLOCK > C:
        first, second = tl.split(tl.permute(tl.reshape(y, [M, 2, C]), [0, 2, 1]))
        y = tl.permute(tl.join(first + second, first - second), [0, 2, 1])
    return tl.reshape(y, [M, WIDTH])


@triton.jit
@no_type_check
def mix_words(x, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """What turning does among words: the signs of BLOCK words, the last axis but one, times x, [..., BLOCK_W, N].

    Products are of DTYPE: of float32, or of bfloat16 and what that loses, which are exact to 2 ** -16.
    """
    BLOCK_W: tl.constexpr = x.shape[-2]
    w = tl.arange(0, BLOCK_W)
    matrix = signs(w[:, None], w[None, :], BLOCK, DTYPE)
    if len(x.shape) == 3:
        matrix = tl.broadcast_to(matrix[None], [x.shape[0], BLOCK_W, BLOCK_W])
    high = x.to(DTYPE)
    y = tl.dot(matrix, high, input_precision="ieee")
    EXACT: tl.constexpr = tl.float32 == DTYPE
    if not EXACT:
        y = tl.dot(matrix, (x - high.to(tl.float32)).to(DTYPE), y)
    return y


@triton.jit
@no_type_check
def mix_words_of(parts, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """`mix_words` of each of the parts."""
    mixed = ()
    for part in tl.static_range(len(parts)):
        mixed += (mix_words(parts[part], BLOCK, DTYPE),)
    return mixed


@triton.jit
@no_type_check
def mix_parts(parts):
    """What turning does within words of values: sums and differences of parts."""
    EACH: tl.constexpr = len(parts)
    for power in tl.static_range(EACH.bit_length() - 1):
        mixed = ()
        for j in tl.static_range(EACH):
            if j >> power & 1:
                mixed += (parts[j ^ (1 << power)] - parts[j],)
            else:
                mixed += (parts[j] + parts[j ^ (1 << power)],)
        parts = mixed
    return parts


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
