"""Appending on the GPU: keys and values in one launch."""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.triton.common import await_launch, check_rows, launch_options, on_device, overlaps_launches


@on_device
def append_triton_(
    tail_k: Float[Tensor, "B H R D"],
    tail_v: Float[Tensor, "B H R D"],
    lengths: Int32[Tensor, " B"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
) -> None:
    """`append_`: tail[b, :, lengths[b] + t] = new[b, :, t]; reads and writes 2 B H T D values once."""
    check_rows(k=k, v=v, tail_k=tail_k, tail_v=tail_v)
    batch, heads, tokens, width = k.shape
    if k.numel() == 0:
        return
    overlap = overlaps_launches(k)
    block_t = 1 if tokens == 1 else 16  # decoding writes one row a head
    block_d = triton.next_power_of_2(width)
    _append_kernel[(batch * heads, triton.cdiv(tokens, block_t))](
        tail_k, tail_v, lengths, k, v, *tail_k.stride()[:3], *tail_v.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, tokens, tail_k.shape[2],
        D=width, BLOCK_D=block_d, BLOCK_T=block_t, OVERLAP=overlap, num_warps=min(max(block_t * block_d // 256, 1), 4),
        **launch_options(overlap),
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "tokens", "capacity"])
@no_type_check
def _append_kernel(
    tail_k_ptr, tail_v_ptr, lengths_ptr, k_ptr, v_ptr,
    stride_tkb, stride_tkh, stride_tkr, stride_tvb, stride_tvh, stride_tvr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, heads, tokens, capacity,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one head of one question."""
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    await_launch(OVERLAP)
    row = tl.load(lengths_ptr + b) + t
    live = ((t < tokens) & (row < capacity))[:, None] & (d < D)[None, :]
    k = tl.load(k_ptr + b * stride_kb + h * stride_kh + (t * stride_kt)[:, None] + d[None, :], mask=live, other=0)
    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + (t * stride_vt)[:, None] + d[None, :], mask=live, other=0)
    to_k = tail_k_ptr + b * stride_tkb + h * stride_tkh + (row * stride_tkr)[:, None] + d[None, :]
    to_v = tail_v_ptr + b * stride_tvb + h * stride_tvh + (row * stride_tvr)[:, None] + d[None, :]
    tl.store(to_k, k, mask=live)  # [BLOCK_T, BLOCK_D]
    tl.store(to_v, v, mask=live)
