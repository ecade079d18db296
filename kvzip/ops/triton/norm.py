"""RMSNorm on the GPU: a row per program, read once."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import await_launch, check_dtype, launch_options, on_device, overlaps_launches


@on_device
def rms_norm_triton(
    x: Float[Tensor, "*b N"],
    weight: Float[Tensor, " N"],
    *,
    eps: float,
    offset: int = 0,
    residual: Float[Tensor, "*b N"] | None = None,
) -> Float[Tensor, "*b N"]:
    """`rms_norm`: x / sqrt(mean(x^2) + eps) * (offset + weight) + residual, float32 inside, rounded once.

    Reads x (and the residual) once and writes once: 2 or 3 values a row and column, 4 operations each.
    """
    check_dtype(x)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    if x.numel() == 0:
        return out
    overlap = overlaps_launches(x)
    block = triton.next_power_of_2(width)
    _norm_kernel[(x.numel() // width,)](
        x, weight, x if residual is None else residual, out, float(eps), float(offset),
        N=width, BLOCK_N=block, RESIDUAL=residual is not None, OVERLAP=overlap,
        num_warps=min(max(block // 512, 1), 8), enable_fp_fusion=True, **launch_options(overlap),
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, eps, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    begin = tl.program_id(0).to(tl.int64) * N
    weight = tl.load(weight_ptr + n, mask=n < N, other=0).to(tl.float32)  # [BLOCK_N]
    await_launch(OVERLAP)
    x = tl.load(x_ptr + begin + n, mask=n < N, other=0).to(tl.float32)  # [BLOCK_N]
    out = x * (1 / tl.sqrt_rn(tl.sum(x * x, 0) / N + eps)) * (offset + weight)
    if RESIDUAL:
        out += tl.load(residual_ptr + begin + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out_ptr + begin + n, out.to(out_ptr.dtype.element_ty), mask=n < N)
