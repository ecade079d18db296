"""Rotation on the GPU: q and k in one launch."""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from kvzip.ops.triton.common import (
    add_parts,
    await_launch,
    check_dtype,
    check_rows,
    launch_options,
    on_device,
    overlaps_launches,
)
from kvzip.ops.types import TailTensors


def rotary_triton(
    qkv: Float[Tensor, "B T W"],
    cos: Float[Tensor, "*b T D"],
    sin: Float[Tensor, "*b T D"],
    *,
    kv_heads: int,
    q_norm: Float[Tensor, " D"] | None = None,
    k_norm: Float[Tensor, " D"] | None = None,
    eps: float = 0.0,
    offset: int = 0,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
    """`rotary`: x cos + [-x2, x1] sin of every (normed) head, float32 inside, rounded once.

    Reads and writes q and k once: 2 (Hq + H) D values a token. One launch replaces about 14 of plain PyTorch.
    """
    return rotate_heads(
        qkv, cos, sin, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, offset=offset, tail=None
    )


@on_device
def rotate_heads(
    qkv: Float[Tensor, "B T W"],
    cos: Float[Tensor, "*b T D"],
    sin: Float[Tensor, "*b T D"],
    *,
    kv_heads: int,
    q_norm: Float[Tensor, " D"] | None,
    k_norm: Float[Tensor, " D"] | None,
    eps: float,
    offset: int,
    tail: TailTensors | None,
    sums: Float32[Tensor, "parts BT W"] | None = None,
    bias: Float[Tensor, " W"] | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
    """`rotary`, and `append_` of k and v to a tail, in one launch.

    With `sums`, of each part of a product's inputs, qkv is the sum of those and the bias, and only memory, to which
    values are written; without them there is no bias.
    """
    check_dtype(qkv)
    batch, tokens, _ = qkv.shape
    width = cos.shape[-1]
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    heads = qkv.shape[-1] // width - 2 * kv_heads
    q = torch.empty((batch, heads, tokens, width), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((batch, kv_heads, tokens, width), dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        overlap = overlaps_launches(qkv)
        block_h = 4 if batch * tokens < 64 else 16  # few tokens: more programs
        block_d = triton.next_power_of_2(width // 2)
        tail_k, tail_v, lengths = (k, k, k) if tail is None else tail
        check_rows(tail_k=tail_k, tail_v=tail_v)
        written = heads + kv_heads * (1 if tail is None and sums is None else 2)
        _rotary_kernel[(batch * tokens, triton.cdiv(written, block_h))](
            qkv, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, q, k,
            qkv if sums is None else sums, qkv if bias is None else bias,
            tail_k, tail_v, lengths, *tail_k.stride()[:3], *tail_v.stride()[:3], tail_k.shape[2],
            tokens, tokens if cos.ndim == 3 else 0, float(eps), float(offset),
            HEADS=heads, KV_HEADS=kv_heads, D=width, BLOCK_H=block_h, BLOCK_D=block_d, NORM=q_norm is not None,
            TAIL=tail is not None, PARTS=0 if sums is None else len(sums), BIAS=bias is not None, OVERLAP=overlap,
            num_warps=min(max(block_h * block_d // 256, 1), 4), enable_fp_fusion=True, **launch_options(overlap),
        )  # fmt: skip
    return q, k, qkv.unflatten(2, (-1, width)).transpose(1, 2)[:, heads + kv_heads :]


@triton.jit(do_not_specialize=["capacity", "tokens", "table_rows"])
@no_type_check
def _rotary_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_ptr, sums_ptr, bias_ptr,
    tail_k_ptr, tail_v_ptr, lengths_ptr,
    stride_kb, stride_kh, stride_kr, stride_vb, stride_vh, stride_vr, capacity, tokens, table_rows, eps, offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, TAIL: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token. `table_rows`: rows of cos and sin per question, 0 if shared."""
    W: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    STORED: tl.constexpr = q_ptr.dtype.element_ty
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    b, t = row // tokens, row % tokens
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_q, is_k, is_v = h < HEADS, (h >= HEADS) & (h < HEADS + KV_HEADS), h >= HEADS + KV_HEADS
    live = (h < HEADS + (2 if TAIL or PARTS > 0 else 1) * KV_HEADS)[:, None] & (d < HALF)[None, :]
    if NORM:
        for_q = is_q[:, None] & live
        weight = d[None, :] + tl.zeros([BLOCK_H, BLOCK_D], tl.int32)
        first_weight = tl.load(q_norm_ptr + weight, mask=for_q, other=0) + tl.load(
            k_norm_ptr + weight, mask=live & is_k[:, None], other=0
        )
        second_weight = tl.load(q_norm_ptr + HALF + weight, mask=for_q, other=0) + tl.load(
            k_norm_ptr + HALF + weight, mask=live & is_k[:, None], other=0
        )
    await_launch(OVERLAP)
    place = (b * table_rows + t) * D + d
    cos = tl.load(cos_ptr + place, mask=d < HALF, other=0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + place, mask=d < HALF, other=0).to(tl.float32)[None, :]
    if TAIL:  # loaded here, as behind the first store all would wait for it
        own = tl.load(lengths_ptr + b) + t
    n = h[:, None] * D + d[None, :]
    at = qkv_ptr + row * W + n
    if PARTS > 0:
        rows = tl.num_programs(0)
        first = add_parts(sums_ptr, row, n, live, W, rows, PARTS)
        second = add_parts(sums_ptr, row, n + HALF, live, W, rows, PARTS)
        if BIAS:
            first += tl.load(bias_ptr + n, mask=live, other=0).to(tl.float32)
            second += tl.load(bias_ptr + n + HALF, mask=live, other=0).to(tl.float32)
        first, second = first.to(STORED), second.to(STORED)
        tl.store(at, first, mask=live & is_v[:, None])
        tl.store(at + HALF, second, mask=live & is_v[:, None])
        first, second = first.to(tl.float32), second.to(tl.float32)
    else:
        first = tl.load(at, mask=live, other=0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
        second = tl.load(at + HALF, mask=live, other=0).to(tl.float32)
    value, value_2 = first, second  # of heads that are not normed or rotated
    if NORM:
        factor = 1 / tl.sqrt_rn((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)
        first *= factor[:, None] * (first_weight.to(tl.float32) + offset)
        second *= factor[:, None] * (second_weight.to(tl.float32) + offset)
    turned, turned_2 = rotated(first, second, cos, sin)
    if TAIL:
        turned, turned_2 = tl.where(is_v[:, None], value, turned), tl.where(is_v[:, None], value_2, turned_2)
    turned, turned_2 = turned.to(STORED), turned_2.to(STORED)
    to_q = q_ptr + ((b * HEADS + h[:, None]) * tokens + t) * D + d[None, :]
    to_k = k_ptr + ((b * KV_HEADS + h[:, None] - HEADS) * tokens + t) * D + d[None, :]
    tl.store(to_q, turned, mask=live & is_q[:, None])
    tl.store(to_q + HALF, turned_2, mask=live & is_q[:, None])
    tl.store(to_k, turned, mask=live & is_k[:, None])
    tl.store(to_k + HALF, turned_2, mask=live & is_k[:, None])
    if TAIL:
        writes = tl.where(own < capacity, h, 0)[:, None]  # of a full tail no head does
        _store_in_tail(
            turned, turned_2, h[:, None], tl.where(live, writes, 0), d[None, :], own,
            tail_k_ptr + b * stride_kb, tail_v_ptr + b * stride_vb, stride_kh, stride_kr, stride_vh, stride_vr,
            HALF, HEADS, KV_HEADS,
        )  # fmt: skip


@triton.jit
@no_type_check
def _store_in_tail(
    first, second, head, writes, j, row, k_ptr, v_ptr, stride_kh, stride_kr, stride_vh, stride_vr,
    HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Stores values j and j + HALF of heads in their tail's row. `writes` is a head, or 0 where nothing is stored."""
    is_k = (writes >= HEADS) & (writes < HEADS + KV_HEADS)
    to_k = k_ptr + (head - HEADS).to(tl.int64) * stride_kh
    to_k += row.to(tl.int64) * stride_kr + j
    tl.store(to_k, first, mask=is_k)
    tl.store(to_k + HALF, second, mask=is_k)
    is_v = writes >= HEADS + KV_HEADS
    to_v = v_ptr + (head - HEADS - KV_HEADS).to(tl.int64) * stride_vh
    to_v += row.to(tl.int64) * stride_vr + j
    tl.store(to_v, first, mask=is_v)
    tl.store(to_v + HALF, second, mask=is_v)


@triton.jit
@no_type_check
def rotated(first, second, cos, sin):
    """Pairs turned by their angles."""
    return first * cos - second * sin, second * cos + first * sin


class RotationArgs(NamedTuple):
    """What a kernel that rotates what it computes reads: tables of one token, and its question's tail.

    Strides are those of heads and rows. Without a tail its tensors are others, and never read.
    """

    cos: Any
    sin: Any
    tail_k: Any
    tail_v: Any
    lengths: Any
    stride_kh: int
    stride_kr: int
    stride_vh: int
    stride_vr: int


class Rotation(NamedTuple):
    """How a kernel rotates what it computes for one token: heads of D = 2 half values, of queries, keys and values."""

    args: RotationArgs | None = None
    capacity: int = 0  # rows of a tail
    half: int = 0  # 0: it does not
    heads: int = 0
    kv_heads: int = 0
    tail: bool = False

    def pairs(self, outputs: int) -> int:
        """Pairs of a program that would have so many outputs, all of one head: as many outputs, or fewer."""
        return min(max(outputs // 2, 1), self.half & -self.half)


NO_ROTATION = Rotation()


def make_rotation(
    cos: Float[Tensor, "*b D"], sin: Float[Tensor, "*b D"], *, heads: int, kv_heads: int, tail: TailTensors | None
) -> Rotation:
    """Returns the rotation of one token, whose keys and values are written to a tail as by `append_`."""
    k, v, lengths = (cos, cos, cos) if tail is None else tail
    check_rows(tail_k=k, tail_v=v)
    strides = (0, 0, 0, 0) if tail is None else (*k.stride()[1:3], *v.stride()[1:3])
    args = RotationArgs(cos.contiguous(), sin.contiguous(), k, v, lengths, *strides)
    capacity = 0 if tail is None else k.shape[2]
    return Rotation(args, capacity, cos.shape[-1] // 2, heads, kv_heads, tail is not None)


@triton.jit
@no_type_check
def load_angles(rotation, n, HALF: tl.constexpr, TAIL: tl.constexpr):
    """cos and sin for outputs n, which are in the first halves of their heads, and how many rows the tail has."""
    j = n % (2 * HALF)
    cos, sin = tl.load(rotation.cos + j).to(tl.float32), tl.load(rotation.sin + j).to(tl.float32)
    length = 0
    if TAIL:
        length = tl.load(rotation.lengths)
    return cos, sin, length


@triton.jit
@no_type_check
def store_rotated(
    first, second, n, angles, out_ptr, rotation, capacity,
    HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Stores outputs n and n + HALF, rotated if of queries or keys; with TAIL also keys and values to the tail."""
    STORED: tl.constexpr = out_ptr.dtype.element_ty
    cos, sin, length = angles
    head, j = n // (2 * HALF), n % (2 * HALF)
    first, second = first.to(STORED), second.to(STORED)  # what rotation by a kernel of its own would read
    turned, turned_2 = rotated(first.to(tl.float32), second.to(tl.float32), cos, sin)
    first = tl.where(head < HEADS + KV_HEADS, turned.to(STORED), first)
    second = tl.where(head < HEADS + KV_HEADS, turned_2.to(STORED), second)
    tl.store(out_ptr + n, first)
    tl.store(out_ptr + n + HALF, second)
    if TAIL:
        writes = tl.where(length < capacity, head, 0)  # of a full tail no head does
        _store_in_tail(
            first, second, head, writes, j, length, rotation.tail_k, rotation.tail_v, rotation.stride_kh,
            rotation.stride_kr, rotation.stride_vh, rotation.stride_vr, HALF, HEADS, KV_HEADS,
        )  # fmt: skip
