"""Codes of keys and values in decoding: operands of products made of them, and the queries that meet them."""

from typing import no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import LOG2_E, dtype_of
from kvzip.ops.triton.turn import mix_parts, mix_words, mix_words_of, turn_rows


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
def join_codes(words, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr):
    """The codes of rows of words, [rows, values], as `codes` gives them, those of 2 bits with TOP; `in_pairs`."""
    EACH: tl.constexpr = 16 // BITS
    parts = ()
    for part in tl.static_range(EACH):
        parts += (codes(words, part, BITS, COMPUTE, PACKED, BITS == 2),)
    return _joined(parts)


@triton.jit
@no_type_check
def _joined(parts):
    """Rows whose value EACH * w + part is value w of `parts[part]`, `in_pairs`."""
    EACH: tl.constexpr = len(parts)
    if EACH == 2:
        x = tl.join(parts[0], parts[1])
    elif EACH == 4:
        x = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        x = tl.join(even, tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])))
    return in_pairs(tl.reshape(x, [parts[0].shape[0], parts[0].shape[1] * EACH]), EACH)


@triton.jit
@no_type_check
def expand_rows(words, step, zero, BITS: tl.constexpr, COMPUTE: tl.constexpr, PACKED: tl.constexpr):
    """Rows of step * code + zero, [rows, values] `in_pairs`, in float32 and rounded to COMPUTE; float16 is clamped.

    Steps are below 1e34. PACKED computes two words' by assembly; COMPUTE is then a dtype of 16 bits.
    """
    EACH: tl.constexpr = 16 // BITS
    step, zero = step[:, None], zero[:, None]
    parts = ()
    if PACKED:
        none = tl.zeros(words.shape, tl.float32)
        ASM: tl.constexpr = expanding(BITS, tl.float16 == COMPUTE)
        WHERE: tl.constexpr = (
            "=r,=r" + (",=r,=r" if EACH > 2 else "") + (",=r,=r,=r,=r" if EACH > 4 else "") + ",r,f,f,f,f"
        )
        args = [words, step + none, zero + none]
        parts = tl.inline_asm_elementwise(ASM, WHERE, args, dtype=repeated(COMPUTE, EACH), is_pure=True, pack=2)
    else:
        MOST: tl.constexpr = 65504.0 if tl.float16 == COMPUTE else 3.38e38
        for part in tl.static_range(EACH):
            SHIFT: tl.constexpr = part * BITS // 8 * 8 + 8 - BITS - part * BITS % 8
            code = ((words.to(tl.int32) >> SHIFT) & (2**BITS - 1)).to(tl.float32)
            value = code * step + zero
            parts += (tl.where(tl.abs(value) > MOST, tl.where(value > 0, MOST, -MOST), value).to(COMPUTE),)
    return _joined(parts)


@getattr(triton, "constexpr_function", lambda function: function)  # as in common.py
def repeated(dtype, count):
    """`count` dtypes."""
    return (dtype,) * count


@getattr(triton, "constexpr_function", lambda function: function)
def expanding(bits, half):  # no types: what Triton reads has none
    """PTX that turns two words of codes, with the step and zero of each, into pairs of 16-bit values, a part each.

    The bits of a code become bits k and higher of the mantissa of a float32 number, 1 + code * 2 ** (k - 23). Times
    step * 2 ** (23 - k), and with what 1 gives taken from the zero before, it is the value. A word's shifts serve
    several codes, at as many k.
    """
    each = 16 // bits
    places = {8: (8,), 4: (12, 16), 2: (14, 16, 18, 20)}[bits]
    shifts = {8: (), 4: (0, 12, -8, 4, -12), 2: (0, -8, 8, -16, 16)}[bits]
    word, steps, zeros = each, (each + 1, each + 2), (each + 3, each + 4)
    lines = [".reg .b32 one, t;", ".reg .f32 x0, x1;", "mov.b32 one, 0x3F800000;"]
    for k in places:
        for e in range(2):
            lines += [f".reg .f32 m{e}_{k}, z{e}_{k};", f"mul.f32 m{e}_{k}, ${steps[e]}, 0f{127 + 23 - k << 23:08X};"]
            lines += [f"sub.f32 z{e}_{k}, ${zeros[e]}, m{e}_{k};"]
    for n, shift in enumerate(shifts):
        lines += [f".reg .b32 w{n};", f"{'shl' if shift >= 0 else 'shr'}.b32 w{n}, ${word}, {abs(shift)};"]
    for part in range(each):
        for e in range(2):
            at = 16 * e + part * bits // 8 * 8 + 8 - bits - part * bits % 8  # where the code begins in both words
            if bits == 8:
                k = places[0]
                lines += [f"prmt.b32 t, ${word}, one, 0x76{at // 8}4;"]  # a byte between the exponent and zeros
            else:
                n = next(n for n, shift in enumerate(shifts) if at + shift in places)
                k = at + shifts[n]
                lines += [f"lop3.b32 t, w{n}, {2**bits - 1 << k}, one, 0xEA;"]  # w & mask | one
            lines += [f"mov.b32 x{e}, t;", f"fma.rn.f32 x{e}, x{e}, m{e}_{k}, z{e}_{k};"]
        lines += [f"cvt.rn.{'satfinite.f16x2' if half else 'bf16x2'}.f32 ${part}, x1, x0;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
@no_type_check
def in_pairs(x, EACH: tl.constexpr):
    """Rows in the order in which registers hold the values of words of EACH codes: of two words that are neighbours
    both values of part 0, then both of part 1. To put them in order takes instructions; products do not ask for it."""
    M: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // (2 * EACH)
    return tl.reshape(tl.permute(tl.reshape(x, [M, W, 2, EACH]), [0, 1, 3, 2]), x.shape)


@triton.jit
@no_type_check
def out_of_pairs(x, EACH: tl.constexpr):
    """Rows that were `in_pairs`, in order."""
    M: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // (2 * EACH)
    return tl.reshape(tl.permute(tl.reshape(x, [M, W, EACH, 2]), [0, 1, 3, 2]), x.shape)


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

    Returns them, [BLOCK_M, BLOCK_D] `in_pairs`, or with KEYS_FIRST as columns in as many parts as a word has codes,
    each [BLOCK_W, BLOCK_M]; sums of the values of a word (KEYS_FIRST), and of a row; the factor that takes products
    back to logits; and scale * q . center, if a softcap needs it in each logit.
    """
    EACH: tl.constexpr = 16 // F.K_BITS
    M: tl.constexpr = F.M
    W: tl.constexpr = F.D // EACH
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    TOP: tl.constexpr = F.K_BITS == 2
    HIGH: tl.constexpr = 6 if F.TURN_K else 10  # turned values are up to sqrt(D) times as large
    d = tl.arange(0, BLOCK_W * EACH)
    central = tl.zeros([M], tl.float32)
    if F.KEYS_FIRST:
        there = (d < F.D)[:, None]
        own = d[:, None]
        if F.PARTS > 1:  # spreads are loaded in the layout of queries; other forms would spill
            own += tl.zeros([1, M], tl.int32)
        if F.CHANNELS:
            spread = tl.load(spread_ptr + own, mask=there, other=0)
        whole = tl.load(q_at[None, :] + d[:, None], mask=there & live[None, :], other=0).to(tl.float32)
        if F.CHANNELS:  # q . (center + spread * rest) = q . center + (q * spread) . rest
            if F.SOFTCAP:
                central = tl.sum(whole * tl.load(center_ptr + own, mask=there, other=0), 0) * scale
            whole = _scaled(whole, spread, F.PACKED and F.PARTS > 1)
        factor, unit = _scales(tl.max(tl.abs(whole), 0), HIGH, scale, softcap, F)
        BLOCK: tl.constexpr = F.D & -F.D
        if F.TURN_K:  # the matrix is symmetric: turned queries meet turned keys
            factor *= 1.0 / BLOCK**0.5
            if F.PARTS > 1:  # all parts in one exchange between threads; other forms would spill
                whole = mix_words(tl.reshape(whole, [BLOCK_W, EACH * M]), BLOCK // EACH, dtype_of(F.TURN))
        parts = _parts(tl.permute(tl.reshape(whole, [BLOCK_W, EACH, M]), [0, 2, 1]), EACH)
        if F.TURN_K:
            if F.PARTS == 1:
                parts = mix_words_of(parts, BLOCK // EACH, dtype_of(F.TURN))
            parts = mix_parts(parts)
        queries = ()
        total = tl.zeros(parts[0].shape, tl.float32)
        for part in tl.static_range(EACH):
            lift = 1.0 if TOP else 2.0 ** (part * F.K_BITS % 8)  # as `lifts`
            q = (parts[part] * (factor * lift)).to(dtype_of(F.K_COMPUTE))
            queries += (q,)
            total += q.to(tl.float32) * (1 / lift)
        return queries, total, tl.sum(total, len(total.shape) - 2), unit, central
    else:
        at, there = q_at[:, None] + d[None, :], live[:, None] & (d < F.D)[None, :]
        whole = tl.load(at, mask=there, other=0).to(tl.float32)
        if F.CHANNELS:
            whole *= tl.load(spread_ptr + d, mask=d < F.D, other=0)[None, :]
        factor, unit = _scales(tl.max(tl.abs(whole), 1), HIGH, scale, softcap, F)
        if F.TURN_K:
            whole = turn_rows(whole, F.D, dtype_of(F.TURN))
        lift = lifts(d, F.K_BITS, TOP)[None, :]
        queries = (whole * (factor * lift)).to(dtype_of(F.K_COMPUTE))
        total = tl.sum(queries.to(tl.float32) / lift, 1)
        if F.CHANNELS and F.SOFTCAP:  # rows are loaded again: beside turning, what is kept of them would spill
            again = tl.load(at, mask=there, other=0, volatile=True).to(tl.float32)
            central = tl.sum(again * tl.load(center_ptr + d, mask=d < F.D, other=0)[None, :], 1) * scale
        return in_pairs(queries, EACH), total, total, unit, central


@triton.jit
@no_type_check
def _scaled(x, spread, PACKED: tl.constexpr):
    """x * spread. PACKED: by assembly said to have effects, through which Triton moves no exchange between threads.

    It would exchange both factors, one after the other, each as soon as it is loaded.
    """
    if PACKED:
        asm: tl.constexpr = "mul.f32 $0, $1, $2;"
        return tl.inline_asm_elementwise(asm, "=f,f,f", [x, spread], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return x * spread


@triton.jit
@no_type_check
def _scales(largest, HIGH: tl.constexpr, scale, softcap, F: tl.constexpr):
    """A power of two that brings the greatest finite one of rows' largest values near 2 ** HIGH, and the factor that
    takes products with codes back to logits."""
    top = largest.to(tl.int32, bitcast=True) >> 23
    top = tl.max(tl.where(top == 255, 0, top), 0)
    top = tl.minimum(tl.maximum(top, 27), 227)
    factor = ((254 + HIGH - top) << 23).to(tl.float32, bitcast=True)
    unit = ((top - HIGH) << 23).to(tl.float32, bitcast=True) * (scale / softcap if F.SOFTCAP else scale * LOG2_E)
    return factor, unit


@triton.jit
@no_type_check
def _parts(x, EACH: tl.constexpr):
    """x[..., part] for each of the EACH parts of [A, B, EACH]."""
    parts = (x,)
    if EACH == 2:
        parts = tl.split(x)
    else:
        even, odd = _alternate(x)
        if EACH == 4:
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            parts = (first, second, third, fourth)
        else:
            even_0, even_1 = _alternate(even)
            odd_0, odd_1 = _alternate(odd)
            a, e = tl.split(even_0)
            c, g = tl.split(even_1)
            b, f = tl.split(odd_0)
            d, h = tl.split(odd_1)
            parts = (a, b, c, d, e, f, g, h)
    return parts


@triton.jit
@no_type_check
def _alternate(x):
    """Every second of [A, B, C], from the first and from the second on: two of [A, B, C // 2]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
