"""Sums over GPUs that read each other's memory, in one launch that takes the residual along.

Every rank has a box, which all ranks can write to. It has two halves, for sums in turn; a half has a row of 64-bit
words for each rank. A rank writes its numbers to its row in every other's box, four bytes in a word beside the number
of the sum, and reads its own box until every word has that number. A word is written whole, so numbers need no flag
after them and no fence before it (what NCCL calls LL). A half is used again two sums later. A rank gets there only
after it has received the sum between from all others, and each sends that only after it has read this one.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from kvzip.ops.triton.common import (
    await_launch,
    check_dtype,
    interpreted,
    launch_options,
    on_device,
    overlaps_launches,
)

BLOCK = 256  # words of a program


def box_shape(size: int, count: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The shape of a box, int64 and zeros at first, for sums of up to `count` numbers over `size` ranks."""
    return 2, size, -(-count * dtype.itemsize // 4)


def new_turns(box: Int64[Tensor, "2 size words"]) -> Int32[Tensor, " programs"]:
    """The number of the next sum of each program: 1, as a new box has 0."""
    return torch.ones(triton.cdiv(box.shape[2], BLOCK), dtype=torch.int32, device=box.device)


@on_device
def sum_ranks_(
    x: Float[Tensor, "*b"],
    boxes: tuple[Int64[Tensor, "2 size words"], ...],
    turns: Int32[Tensor, " programs"],
    *,
    rank: int,
    residual: Float[Tensor, "*b"] | None = None,
) -> Float[Tensor, "*b"]:
    """Returns the sum of every rank's x, in the order of ranks, plus residual; float32 inside, rounded once.

    All ranks get the same bits. Each sends x to the others, 8 bytes for 4, and reads its own box. CUDA graphs may
    capture it. All ranks must call it as often and with as many numbers, or those that did will wait for ever.

    Args:
        x: contiguous, an even number of 16-bit numbers, no more than a box's row has room for.
        boxes: of every rank, of `box_shape`; memory of other GPUs but for the own one.
        turns: of `new_turns`, the rank's own; each sum counts one further.
        residual: added on every rank, so it must be the same on all; of x's shape and dtype.

    Raises: ValueError for another number of words than a box has room for, or another residual.
    """
    check_dtype(x)
    if x.nbytes % 4 or x.nbytes // 4 > boxes[rank].shape[2]:
        raise ValueError(f"expected whole words of 4 bytes, at most {boxes[rank].shape[2]}, got {x.nbytes} bytes")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"expected a residual {list(x.shape)} of {x.dtype}, got {list(residual.shape)}")
    if not x.numel():
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    words, overlap = x.nbytes // 4, overlaps_launches(x)
    residual = None if residual is None else residual.contiguous().view(-1).view(torch.int32)
    numbers = x.view(-1).view(torch.int32)
    _sum_kernel[(triton.cdiv(words, BLOCK),)](
        numbers, numbers if residual is None else residual, out.view(-1).view(torch.int32), boxes, turns, words,
        CAPACITY=boxes[rank].shape[2], RANK=rank, SIZE=len(boxes), DTYPE=str(x.dtype).removeprefix("torch."),
        RESIDUAL=residual is not None, BLOCK=BLOCK, ASM=not interpreted(), OVERLAP=overlap,
        num_warps=4, **launch_options(overlap),
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _send(place, word, ASM: tl.constexpr):
    """Stores 64-bit words, each whole, for another GPU to see."""
    if ASM:
        asm: tl.constexpr = "st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l,l", [place.to(tl.int64), word], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(place, word)


@triton.jit
@no_type_check
def _numbers(word, DTYPE: tl.constexpr):
    """The one or two numbers of 32 bits, in float32; of one number the second is 0."""
    if DTYPE == "float32":
        return word.to(tl.float32, bitcast=True), tl.zeros(word.shape, tl.float32)
    elif DTYPE == "bfloat16":
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = (word & 65535).to(tl.int16), (word >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
@no_type_check
def _bits(low, high, DTYPE: tl.constexpr):
    """The 32 bits of one or two numbers, rounded to their dtype."""
    if DTYPE == "float32":
        return low.to(tl.int32, bitcast=True)
    elif DTYPE == "bfloat16":
        low, high = low.to(tl.bfloat16).to(tl.int16, bitcast=True), high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        low, high = low.to(tl.float16).to(tl.int16, bitcast=True), high.to(tl.float16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 65535) | (high.to(tl.int32) << 16)


@triton.jit(do_not_specialize=["words"])
@no_type_check
def _sum_kernel(
    x_ptr, residual_ptr, out_ptr, boxes, turns_ptr, words,
    CAPACITY: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK words. The last words are sent and summed more than once where fewer are left."""
    w = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), words - 1)
    await_launch(OVERLAP)
    turn = tl.load(turns_ptr + tl.program_id(0))
    own = tl.load(x_ptr + w)
    if RESIDUAL:  # loaded while other ranks' numbers are under way
        residual = tl.load(residual_ptr + w)
    word = (turn.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    half = (turn & 1).to(tl.int64) * (SIZE * CAPACITY)
    for step in tl.static_range(1, SIZE):
        _send(boxes[(RANK + step) % SIZE] + (half + RANK * CAPACITY) + w, word, ASM)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            first, second = _numbers(own, DTYPE)
        else:
            place = boxes[RANK] + (half + rank * CAPACITY) + w
            found = tl.load(place, volatile=True)
            while tl.max(((found >> 32).to(tl.int32) != turn).to(tl.int32), 0) != 0:
                found = tl.load(place, volatile=True)
            first, second = _numbers(found.to(tl.int32), DTYPE)
        low += first
        high += second
    if RESIDUAL:
        first, second = _numbers(residual, DTYPE)
        low += first
        high += second
    tl.store(out_ptr + w, _bits(low, high, DTYPE))
    tl.debug_barrier()  # every thread has read the turn
    tl.store(turns_ptr + tl.program_id(0), turn + 1)
