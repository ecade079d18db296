"""Packing of kept rows: count, place, copy.

position[offset[h] + rank of (h, s) among the kept of h] = s, then out[i] = rows[h, position[i]]. Three kernels: the
kept columns of each block are counted; each block adds up the counts before it and writes its positions; programs
over packed rows copy k and v. Bit-exact.

Bytes: N rows read and written, for k and v, plus the mask twice and the positions. Measured: docs/tuning.md.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from kvzip.ops.triton.common import on_device
from kvzip.ops.types import Packed

BLOCK_S = 4096  # columns of the mask that one program counts and places


def launch_config(D: int) -> tuple[int, int]:
    """Packed rows of one copying program and its warps. Tuned on an H100, 2026-11-24: docs/tuning.md."""
    return max(8, 4096 // triton.next_power_of_2(D)), 4  # the sizes that were tried take as long


@on_device
def prune_triton(
    k: Float[Tensor, "H S D"], v: Float[Tensor, "H S D"], keep: Bool[Tensor, "H S"], *, total: int | None = None
) -> Packed:
    H, S, D = k.shape
    device = k.device
    offsets = torch.zeros(H + 1, dtype=torch.int32, device=device)
    if total is None:
        total = int(keep.sum())
    positions = torch.empty(total, dtype=torch.int32, device=device)
    packed_k, packed_v = k.new_empty(total, D), v.new_empty(total, D)
    if H * S == 0:
        return packed_k, packed_v, offsets, positions

    mask = keep.view(torch.uint8)
    blocks = triton.cdiv(S, BLOCK_S)
    counts = torch.empty(H * blocks, dtype=torch.int32, device=device)
    _count_kernel[(H * blocks,)](mask, counts, S, blocks, *mask.stride(), BLOCK_S=BLOCK_S, num_warps=4)
    _place_kernel[(H * blocks,)](
        mask, counts, offsets, positions, S, blocks, total, *mask.stride(), BLOCK_S=BLOCK_S, num_warps=4
    )
    if total == 0 or D == 0:
        return packed_k, packed_v, offsets, positions
    block_n, warps = launch_config(D)
    _copy_kernel[(triton.cdiv(total, block_n),)](
        k, v, offsets, positions, packed_k, packed_v, total, *k.stride()[:2], *v.stride()[:2],
        H=H, D=D, BLOCK_H=triton.next_power_of_2(H), BLOCK_D=triton.next_power_of_2(D), BLOCK_N=block_n,
        num_warps=warps,
    )  # fmt: skip
    return packed_k, packed_v, offsets, positions


@triton.jit
@no_type_check
def _kept(mask_ptr, head, block, S, stride_mh, stride_ms, BLOCK_S: tl.constexpr):
    columns = block * BLOCK_S + tl.arange(0, BLOCK_S)
    address = mask_ptr + head.to(tl.int64) * stride_mh + columns.to(tl.int64) * stride_ms
    return (tl.load(address, mask=columns < S, other=0) != 0).to(tl.int32)  # [BLOCK_S]


@triton.jit
@no_type_check
def _count_kernel(mask_ptr, counts_ptr, S, blocks, stride_mh, stride_ms, BLOCK_S: tl.constexpr):
    pid = tl.program_id(0)
    kept = _kept(mask_ptr, pid // blocks, pid % blocks, S, stride_mh, stride_ms, BLOCK_S)
    tl.store(counts_ptr + pid, tl.sum(kept))


@triton.jit
@no_type_check
def _place_kernel(
    mask_ptr, counts_ptr, offsets_ptr, positions_ptr, S, blocks, total, stride_mh, stride_ms, BLOCK_S: tl.constexpr
):
    pid = tl.program_id(0)
    before = 0
    for first in range(0, pid, BLOCK_S):
        others = first + tl.arange(0, BLOCK_S)
        before += tl.sum(tl.load(counts_ptr + others, mask=others < pid, other=0))
    kept = _kept(mask_ptr, pid // blocks, pid % blocks, S, stride_mh, stride_ms, BLOCK_S)
    last = before + tl.cumsum(kept)  # [BLOCK_S]
    if (pid + 1) % blocks == 0:
        tl.store(offsets_ptr + (pid + 1) // blocks, before + tl.sum(kept))
    columns = (pid % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    tl.store(positions_ptr + last - 1, columns, mask=(kept != 0) & (last <= total))


@triton.jit
@no_type_check
def _copy_kernel(
    k_ptr, v_ptr, offsets_ptr, positions_ptr, packed_k_ptr, packed_v_ptr, total, stride_kh, stride_ks, stride_vh,
    stride_vs, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    heads = tl.arange(0, BLOCK_H)
    ends = tl.load(offsets_ptr + 1 + heads, mask=heads < H, other=2**31 - 1)
    head = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int64), axis=1)  # [BLOCK_N]
    valid = (rows < total) & (head < H)
    token = tl.load(positions_ptr + rows, mask=valid, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < D)[None, :]
    from_k = k_ptr + (head * stride_kh + token * stride_ks)[:, None] + columns[None, :]
    from_v = v_ptr + (head * stride_vh + token * stride_vs)[:, None] + columns[None, :]
    k = tl.load(from_k, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_D]
    v = tl.load(from_v, mask=inside, other=0.0)
    to = rows[:, None] * D + columns[None, :]
    tl.store(packed_k_ptr + to, k, mask=inside)
    tl.store(packed_v_ptr + to, v, mask=inside)
