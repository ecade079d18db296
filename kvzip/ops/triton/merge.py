"""Merging on the GPU: one pass over both results."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import LOG2_E, on_device


@on_device
def merge_triton(
    a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """`merge` in one pass: reads a and b once, writes once."""
    width = a.shape[-1]
    out, lse = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, lse_a))
    a, lse_a, b, lse_b = (x.contiguous() for x in (a, lse_a, b, lse_b))
    if out.numel():
        block = 16
        _merge_kernel[(triton.cdiv(lse.numel(), block),)](
            a, lse_a, b, lse_b, out, lse, lse.numel(),
            D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out, lse


@triton.jit
@no_type_check
def _merge_kernel(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    lse_a = tl.load(lse_a_ptr + row, mask=row < rows, other=0)
    lse_b = tl.load(lse_b_ptr + row, mask=row < rows, other=0)
    peak = tl.maximum(lse_a, lse_b)
    floor = tl.where(peak == float("-inf"), 0.0, peak)
    weight_a, weight_b = tl.exp2((lse_a - floor) * LOG2_E), tl.exp2((lse_b - floor) * LOG2_E)
    total = weight_a + weight_b
    share = 1 / tl.where(total == 0, 1.0, total)
    at = row[:, None] * D + d[None, :]
    live = (row < rows)[:, None] & (d < D)[None, :]
    a = tl.load(a_ptr + at, mask=live, other=0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=live, other=0).to(tl.float32)
    out = a * (weight_a * share)[:, None] + b * (weight_b * share)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)
    tl.store(lse_ptr + row, peak + tl.log(total), mask=row < rows)
