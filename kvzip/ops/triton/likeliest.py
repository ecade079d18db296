"""The likeliest token on the GPU: parts of all rows are searched side by side, then what they found."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from kvzip.ops.triton.common import (
    await_launch,
    check_dtype,
    check_rows,
    launch_options,
    on_device,
    overlaps_launches,
)

_PART = 1024  # scores of a program
_LOWEST = tl.constexpr(-(2**63))
_INFINITE = tl.constexpr(-2139095041)  # what `_ordered` makes of -inf
_LOST = tl.constexpr(2**31 - 1)  # and of NaN


@on_device
def likeliest_triton(scores: Float[Tensor, "B V"]) -> Int64[Tensor, " B"]:
    """`likeliest` by two launches: reads B V scores once."""
    check_dtype(scores)
    check_rows(scores=scores)
    rows, width = scores.shape
    parts = triton.cdiv(width, _PART)
    found = torch.empty((rows, parts), dtype=torch.long, device=scores.device)
    out = torch.empty(rows, dtype=torch.long, device=scores.device)
    if rows:
        overlap = overlaps_launches(scores)
        how = {"OVERLAP": overlap, "num_warps": 4, **launch_options(overlap)}
        _parts_kernel[(rows, parts)](scores, found, scores.stride(0), width, BLOCK=_PART, **how)
        _places_kernel[(rows,)](found, out, parts, width, BLOCK=triton.next_power_of_2(parts), **how)
    return out


@triton.jit
@no_type_check
def _ordered(x):
    """Integers in the order of float32 numbers: both zeros alike, NaN above all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _LOST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit(do_not_specialize=["width"])
@no_type_check
def _parts_kernel(scores_ptr, found_ptr, stride, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program: a part of a row. What it finds is one number: the order of a score, then its place from the end."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    await_launch(OVERLAP)
    x = tl.load(scores_ptr + row * stride + place, mask=place < width, other=0).to(tl.float32)
    key = (_ordered(x).to(tl.int64) << 32) | (width - 1 - place).to(tl.int64)
    found = tl.max(tl.where(place < width, key, _LOWEST), 0)
    tl.store(found_ptr + row * tl.num_programs(1) + part, found)


@triton.jit(do_not_specialize=["parts", "width"])
@no_type_check
def _places_kernel(found_ptr, out_ptr, parts, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program: a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    await_launch(OVERLAP)
    found = tl.max(tl.load(found_ptr + row * parts + part, mask=part < parts, other=_LOWEST), 0)
    order = found >> 32
    place = width - 1 - (found & 0xFFFFFFFF)
    tl.store(out_ptr + row, tl.where((order == _LOST) | (order <= _INFINITE), -1, place))
