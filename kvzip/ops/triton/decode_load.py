"""Loaders of decoding: query rows, keys and values as rows of 16 or 32 bits, as codes, or in pages, and their steps."""

from typing import no_type_check

import triton
import triton.language as tl

from kvzip.ops.triton.common import prefetch


@triton.jit
@no_type_check
def prefetch_rows(ptr, begin, stop, stride, BYTES: tl.constexpr):
    """Prefetches the first BYTES of rows begin:stop to L2. It uses no value, so it may run before `await_launch`."""
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    at = begin.to(tl.int64) * stride * SIZE + 64 * tl.arange(0, BYTES // 64)
    prefetch(ptr.to(tl.int64) + tl.minimum(at, (stop.to(tl.int64) * stride - 1) * SIZE))


@triton.jit
@no_type_check
def keys_of(N: tl.constexpr, PARTS: tl.constexpr):
    """0 to N - 1, [N]; or in equal parts, [PARTS, keys of each], one for each warp."""
    EACH: tl.constexpr = N // PARTS
    if PARTS > 1:
        return tl.arange(0, PARTS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    else:
        return tl.arange(0, N)


@triton.jit
@no_type_check
def load_tile(
    ptr, at, stride, bound, table_ptr, stride_page, W: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Rows at:at + BLOCK_N of W elements, padded with zeros: [BLOCK_N, BLOCK_W], or [BLOCK_W, BLOCK_N] if TRANSPOSED.

    MASKED: rows at and after at + bound are zeros too. PAGE: row j is row j % PAGE of page table[j // PAGE].
    """
    BLOCK_W: tl.constexpr = 16 if W < 16 else triton.next_power_of_2(W)
    n = keys_of(BLOCK_N, PARTS)
    w = tl.arange(0, BLOCK_W)
    if PAGE > 0:
        j = at + n
        page = tl.load(table_ptr + j // PAGE, mask=n < bound, other=0)
        offset = page * stride_page + j % PAGE * stride
    else:
        ptr += (at + tl.zeros([], tl.int64)) * stride
        offset = n * stride
    if TRANSPOSED:
        place = ptr + (tl.expand_dims(offset, -2) + w[:, None])
        row, column = tl.expand_dims(n < bound, -2), (w < W)[:, None]
    else:
        place = ptr + (tl.expand_dims(offset, -1) + w)
        row, column = tl.expand_dims(n < bound, -1), w < W
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
def load_vector(
    ptr, row, stop, PART: tl.constexpr, Q: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Number PART of the Q numbers of each row from `row` on. MASKED: 0 for rows at and after `stop`."""
    n = keys_of(BLOCK_N, PARTS)
    place = (row + tl.zeros([], tl.int64)) * Q + (n * Q + PART)
    if MASKED:
        return tl.load(ptr + place, mask=n < stop - row, other=0)
    else:
        return tl.load(ptr + place)


@getattr(triton, "constexpr_function", lambda function: function)  # as in common.py
def same(*dtypes):  # no types: what Triton reads has none
    """In a kernel, whether all dtypes are the same."""
    return all(dtype == dtypes[0] for dtype in dtypes)


@triton.jit
@no_type_check
def load_together(ptrs, row, stop, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """A number of each row from each of four tensors, [BLOCK_N, 4], as by `load_vector`.

    As a tile they are loaded once for all threads: of a tensor with fewer numbers than threads Triton has each thread
    load those that it uses, which are many where keys are the columns of products.
    """
    SIZE: tl.constexpr = ptrs[0].dtype.element_ty.primitive_bitwidth // 8
    c = tl.arange(0, 4)
    n = tl.arange(0, BLOCK_N)
    low = tl.where(c == 0, ptrs[0].to(tl.int64), ptrs[1].to(tl.int64))
    high = tl.where(c == 2, ptrs[2].to(tl.int64), ptrs[3].to(tl.int64))
    base = tl.where(c < 2, low, high) + (row + tl.zeros([], tl.int64)) * SIZE
    place = (base[None, :] + (n * SIZE)[:, None]).to(ptrs[0].dtype)
    if MASKED:
        return tl.load(place, mask=(n < stop - row)[:, None], other=0)
    else:
        return tl.load(place)


@triton.jit
@no_type_check
def take_apart(four, CONVERT: tl.constexpr):
    """The four vectors of `load_together`, as they are stored.

    CONVERT: float16 is made float32 before threads exchange the numbers, by assembly, for Triton would have each thread
    convert those that it uses: fewer instructions, more registers.
    """
    if CONVERT and four.dtype == tl.float16:
        four = tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [four], dtype=tl.float32, is_pure=True, pack=1)
    low, high = tl.split(tl.permute(tl.reshape(four, [four.shape[0], 2, 2]), [0, 2, 1]))
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    return first, second, third, fourth


@triton.jit
@no_type_check
def store_together(at, parts, mask, PACKED: tl.constexpr):
    """Stores value i of each of the parts, float32, i after `at`.

    PACKED: by assembly, from the registers in which they are; Triton would exchange each part between threads first.
    """
    COUNT: tl.constexpr = len(parts)
    if PACKED:
        args = (at.to(tl.int64), mask.to(tl.int32))
        args += parts
        ASM: tl.constexpr = storing(COUNT)
        tl.inline_asm_elementwise(ASM, "=r,l,r" + ",f" * COUNT, args, dtype=tl.int32, is_pure=False, pack=1)
    else:
        for part in tl.static_range(COUNT):
            tl.store(at + part, parts[part], mask=mask)


@getattr(triton, "constexpr_function", lambda function: function)
def storing(count):
    """PTX that stores `count` numbers of 32 bits, $3 and on, at $1 if $2 is not 0."""
    lines = [".reg .pred p;", "setp.ne.b32 p, $2, 0;"]
    for first in range(0, count, 4):
        names = [f"${3 + i}" for i in range(first, min(first + 4, count))]
        vector = f".v{len(names)}.f32" if len(names) > 1 else ".f32"
        lines += [f"@p st.global{vector} [$1 + {4 * first}], {{ {', '.join(names)} }};"]
    return "{ " + " ".join([*lines, "mov.b32 $0, 0;"]) + " }"


@triton.jit
@no_type_check
def load_queries(q_at, live, D: tl.constexpr, COMPUTE: tl.constexpr):
    """Query rows, [BLOCK_M, BLOCK_D]."""
    d = tl.arange(0, 16 if D < 16 else triton.next_power_of_2(D))
    return tl.load(q_at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0).to(COMPUTE)
