"""Loaders of decoding: query rows, and keys and values as rows of 16 or 32 bits, as codes, or in pages."""

from typing import no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import LOG2_E, dtype_of, prefetch
from kvzip.ops.triton.turn import turn_columns, turn_rows


@triton.jit
@no_type_check
def prefetch_rows(ptr, begin, stop, stride, BYTES: tl.constexpr):
    """Prefetches the first BYTES of rows begin:stop to L2. It uses no value, so it may run before `await_launch`."""
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    at = begin.to(tl.int64) * stride * SIZE + 64 * tl.arange(0, BYTES // 64)
    prefetch(ptr.to(tl.int64) + tl.minimum(at, (stop.to(tl.int64) * stride - 1) * SIZE))


@triton.jit
@no_type_check
def load_tile(
    ptr, at, stride, bound, table_ptr, stride_page, W: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Rows at:at + BLOCK_N of W elements, padded with zeros: [BLOCK_N, BLOCK_W], or [BLOCK_W, BLOCK_N] if TRANSPOSED.

    MASKED: rows at and after at + bound are zeros too. PAGE: row j is row j % PAGE of page table[j // PAGE].
    """
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    n = tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    if PAGE > 0:
        j = at + n
        page = tl.load(table_ptr + j // PAGE, mask=n < bound, other=0)
        offset = page * stride_page + j % PAGE * stride
    else:
        ptr += (at + tl.zeros([], tl.int64)) * stride
        offset = n * stride
    if TRANSPOSED:
        place = ptr + (offset[None, :] + w[:, None])
        row, column = (n < bound)[None, :], (w < W)[:, None]
    else:
        place = ptr + (offset[:, None] + w[None, :])
        row, column = (n < bound)[:, None], (w < W)[None, :]
    if MASKED:
        if W == BLOCK_W:
            return tl.load(place, mask=row, other=0)
        else:
            return tl.load(place, mask=row & column, other=0)
    else:
        if W == BLOCK_W:
            return tl.load(place)
        else:
            return tl.load(place, mask=column, other=0)


@triton.jit
@no_type_check
def load_vector(ptr, row, stop, PART: tl.constexpr, Q: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Number PART of the Q numbers of each row from `row` on. MASKED: 0 for rows at and after `stop`."""
    n = tl.arange(0, BLOCK_N)
    place = (row + tl.zeros([], tl.int64)) * Q + (n * Q + PART)
    if MASKED:
        return tl.load(ptr + place, mask=n < stop - row, other=0)
    else:
        return tl.load(ptr + place)


@triton.jit
@no_type_check
def codes(
    words, PART: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr, TOP: tl.constexpr
):
    """Code PART of each 16-bit word, times 2 ** (s - 24), where it begins at bit s of its byte: the first is highest.

    PACKED converts two words by one instruction: the bits of a code, read as float16, are a subnormal number, which
    tensor cores multiply. They align products by their operands' exponents, as if such a number were 2 ** -14, and lose
    as many of a sum's 26 bits as its leading bit is below that: 6 of a low code of 4 bits, and 8 of one of 2 bits.
    TOP, for 2 bits, moves all codes to the highest bits of the mantissa, which costs an instruction: times 2 ** -16.
    """
    if not PACKED:
        SHIFT: tl.constexpr = 8 - BITS - PART * BITS % 8
        BYTE: tl.constexpr = PART * BITS // 8 * 8
        CENTER: tl.constexpr = 2 ** (BITS - 1) if tl.float32 == COMPUTE else 0
        UNIT: tl.constexpr = 2.0**-16 if TOP else 2.0 ** (SHIFT - 24)
        return ((((words.to(tl.int32) >> (BYTE + SHIFT)) & (2**BITS - 1)) - CENTER).to(tl.float32) * UNIT).to(COMPUTE)
    elif BITS == 8:
        SELECT: tl.constexpr = "0x4240" if PART == 0 else "0x4341"
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, " + SELECT + ";", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    elif TOP:
        LEFT: tl.constexpr = "2" if PART == 0 else "4" if PART == 1 else "6" if PART == 2 else "8"
        RIGHT: tl.constexpr = "6" if PART == 4 else "4" if PART == 5 else "2" if PART == 6 else "0"
        SHIFT: tl.constexpr = "shl.b32 x, $1, " + LEFT if PART < 4 else "shr.b32 x, $1, " + RIGHT
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x; " + SHIFT + "; and.b32 $0, x, 0x03000300; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        BYTE: tl.constexpr = "0" if PART * BITS < 8 else "8"
        HALVES: tl.constexpr = "0x00F000F0" if PART % 2 == 0 else "0x000F000F"
        FIRST: tl.constexpr = "0x00C000C0" if PART % 4 == 0 else "0x00300030"
        LAST: tl.constexpr = "0x000C000C" if PART % 4 == 2 else "0x00030003"
        MASK: tl.constexpr = HALVES if BITS == 4 else FIRST if PART % 4 < 2 else LAST
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x; shr.b32 x, $1, " + BYTE + "; and.b32 $0, x, " + MASK + "; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
@no_type_check
def load_queries(q_at, live, D: tl.constexpr, COMPUTE: tl.constexpr):
    """Query rows, [BLOCK_M, BLOCK_D]."""
    d = tl.arange(0, 16 if D < 16 else triton.next_power_of_2(D))
    return tl.load(q_at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0).to(COMPUTE)


@triton.jit
@no_type_check
def join_parts(words, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr, TOP: tl.constexpr):
    """The codes of rows of words in their order, [rows, values], as `codes` gives them."""
    EACH: tl.constexpr = 16 // BITS
    parts = ()
    for part in tl.static_range(EACH):
        parts += (codes(words, part, BITS, COMPUTE, PACKED, TOP),)
    if BITS == 8:
        x = tl.join(parts[0], parts[1])
    elif BITS == 4:
        x = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        x = tl.join(even, tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])))
    return tl.reshape(x, [words.shape[0], words.shape[1] * EACH])


@triton.jit
@no_type_check
def lifts(d, BITS: tl.constexpr, TOP: tl.constexpr):
    """2 ** (8 - BITS - s) for value d of a row, whose code begins at bit s of its byte: what `codes` gives is so much
    less than that of the first code of a byte. 1 with TOP."""
    shift = d * 0 if TOP else d % (16 // BITS) * BITS % 8
    return ((127 + shift) << 23).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def load_queries_for_codes(q_at, live, center_ptr, spread_ptr, scale, softcap, F: tl.constexpr):
    """Query rows for products with codes, scaled by a power of two so that float16 holds them.

    Returns them, [BLOCK_M, BLOCK_D], or with KEYS_FIRST as columns in as many parts as a word has codes, each
    [BLOCK_W, BLOCK_M]; sums of the values of a word (KEYS_FIRST), and of a row; the factor that takes products back to
    logits; and scale * q . center, if a softcap needs it in each logit.
    """
    EACH: tl.constexpr = 16 // F.K_BITS
    M: tl.constexpr = F.M
    W: tl.constexpr = F.D // EACH
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    AXIS: tl.constexpr = 0 if F.KEYS_FIRST else 1
    w = tl.arange(0, BLOCK_W)
    d = tl.arange(0, BLOCK_W * EACH)
    if F.KEYS_FIRST:
        at, mask = q_at[None, :] + d[:, None], (d < F.D)[:, None] & live[None, :]
    else:
        at, mask = q_at[:, None] + d[None, :], live[:, None] & (d < F.D)[None, :]
    whole = tl.load(at, mask=mask, other=0).to(tl.float32)
    central = tl.zeros([M], tl.float32)
    if F.CHANNELS:  # q . (center + spread * rest) = q . center + (q * spread) . rest
        if F.SOFTCAP:
            center = tl.load(center_ptr + d, mask=d < F.D, other=0)
            central = tl.sum(whole * (center[:, None] if F.KEYS_FIRST else center[None, :]), AXIS) * scale
        spread = tl.load(spread_ptr + d, mask=d < F.D, other=0)
        whole *= spread[:, None] if F.KEYS_FIRST else spread[None, :]
    top = tl.max(tl.abs(whole), AXIS).to(tl.int32, bitcast=True) >> 23
    top = tl.max(tl.where(top == 255, 0, top), 0)
    top = tl.minimum(tl.maximum(top, 27), 227)
    HIGH: tl.constexpr = 6 if F.TURN_K else 10  # turned values are up to sqrt(D) times as large
    factor = ((254 + HIGH - top) << 23).to(tl.float32, bitcast=True)  # brings the largest finite value near 2 ** HIGH
    unit = ((top - HIGH) << 23).to(tl.float32, bitcast=True) * (scale / softcap if F.SOFTCAP else scale * LOG2_E)
    TOP: tl.constexpr = F.K_BITS == 2
    if F.KEYS_FIRST:
        parts = ()
        for part in tl.static_range(EACH):
            q = tl.load(
                q_at[None, :] + (EACH * w + part)[:, None], mask=(w < W)[:, None] & live[None, :], other=0
            ).to(tl.float32)  # fmt: skip
            if F.CHANNELS:
                q *= tl.load(spread_ptr + EACH * w + part, mask=w < W, other=0)[:, None]
            parts += (q,)
        if F.TURN_K:  # the matrix is symmetric: turned queries meet turned keys
            parts = turn_columns(parts, F.D, EACH, dtype_of(F.TURN))
        queries = ()
        total = tl.zeros([BLOCK_W, M], tl.float32)
        for part in tl.static_range(EACH):
            lift = 1.0 if TOP else 2.0 ** (part * F.K_BITS % 8)  # as `lifts`
            q = (parts[part] * (factor * lift)).to(dtype_of(F.K_COMPUTE))
            queries += (q,)
            total += q.to(tl.float32) * (1 / lift)
        return queries, total, tl.sum(total, 0), unit, central
    else:
        if F.TURN_K:
            whole = turn_rows(whole, F.D, dtype_of(F.TURN))
        lift = lifts(d, F.K_BITS, TOP)[None, :]
        queries = (whole * (factor * lift)).to(dtype_of(F.K_COMPUTE))
        total = tl.sum(queries.to(tl.float32) / lift, 1)
        return queries, total, total, unit, central
