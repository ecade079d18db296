"""The gate of an MLP on the GPU, after products that do not gate their outputs themselves (those of cuBLAS)."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import activate, await_launch, launch_options, on_device, overlaps_launches


@on_device
def gated(x: Float[Tensor, "*b N"], gate: str) -> Float[Tensor, "*b M"]:
    """Returns gate(first half) * second half of the last axis, float32 inside, rounded once."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel():
        overlap = overlaps_launches(x)
        block = min(triton.next_power_of_2(width), 1024)
        _gate_kernel[(out.numel() // width, triton.cdiv(width, block))](
            x, out, N=width, BLOCK_N=block, GATE=gate, OVERLAP=overlap, num_warps=4, enable_fp_fusion=True,
            **launch_options(overlap),
        )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _gate_kernel(x_ptr, out_ptr, N: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    await_launch(OVERLAP)
    first = tl.load(x_ptr + row * 2 * N + n, mask=n < N, other=0).to(tl.float32)  # [BLOCK_N]
    second = tl.load(x_ptr + row * 2 * N + N + n, mask=n < N, other=0).to(tl.float32)
    out = activate(first, GATE) * second
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)
