"""The linear layer with weights in 8 or 4 bits for a few rows: many outputs share what a program reads of x.

Weights are the rows (M) of the products, as many as Hopper's tensor cores take at once, and rows of x the columns. With
few outputs that makes few programs: the inputs are then cut into parts, whose sums a second kernel adds up. Scales
multiply sums of a group; codes themselves are exact in 16 bits.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from kvzip.ops.triton.codes import convert_words, unpacking_words, within_group
from kvzip.ops.triton.common import (
    activate,
    add_parts,
    await_launch,
    compute_dtype,
    interpreted,
    launch_options,
    on_device,
    overlaps_launches,
    prefetch_starts,
)
from kvzip.ops.weights import QuantizedWeight


class Launch(NamedTuple):
    """Sizes of one launch: rows of a product (outputs, gates counted), bytes of each in a tile, tiles in flight."""

    block_m: int  # 16 for each warp
    block_bytes: int
    stages: int
    parts: int  # of the inputs
    ahead: int = 256  # of each output, to L2, before the wait for the launch in front


def takes_columns(weight: QuantizedWeight, rows: int, x: Tensor) -> bool:
    """Whether `few_columns` is the faster kernel for so many rows, at most 64: 8 bits from 9 on, 4 bits from 2."""
    return x.dtype != torch.float32 and weight.codes.shape[1] % 2 == 0 and rows > (1 if weight.kind == "int4" else 8)


def launch_config(kind: str, outputs: int, inputs: int, rows: int) -> Launch:
    """The launch for N outputs and K inputs. Tuned within steps on an H100 (8 bits) and an H200: docs/tuning.md."""
    if kind == "int4":
        block_m = 64 if rows >= 4 else 128
        if inputs > 8192:
            return Launch(block_m, 64, 3, 7)
        if outputs > 8192:
            return Launch(block_m, 64, 3, 1, ahead=0)
        return Launch(block_m, 64, 3, 4)
    if inputs > 8192:
        return Launch(64, 128, 5, 8)
    if outputs > 8192:
        return Launch(64, 128, 3, 1, ahead=0)
    return Launch(64, 128, 3, 8) if outputs > 4096 else Launch(64, 128, 6, 2)


def few_columns(
    x: Float[Tensor, "*b K"],
    weight: QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
    config: Launch | None = None,
) -> Float[Tensor, "*b M"]:
    """`linear` of up to 64 rows of 16 bits as one launch that reads every code once, or as two."""
    out, sums = column_products(x, weight, bias, gate=gate, residual=residual, config=config)
    return out if sums is None else _added(sums, out, bias, residual)


@on_device
def column_products(
    x: Float[Tensor, "*b K"],
    weight: QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
    config: Launch | None = None,
) -> tuple[Float[Tensor, "*b M"], Float32[Tensor, "parts rows N"] | None]:
    """One launch: `few_columns` whole; or memory for it, and the sums of each part of the inputs, for another launch to
    add up with bias and residual."""
    outputs, inputs = weight.shape
    rows, width = x.numel() // inputs, weight.codes.shape[1]
    x = x.contiguous()
    config = config or launch_config(weight.kind, outputs, inputs, rows)
    block = within_group(config.block_bytes, weight)
    N = outputs if gate is None else outputs // 2
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    parts = 1 if gate is not None else min(config.parts, triton.cdiv(width, block))
    sums = torch.empty((parts, rows, N), dtype=torch.float32, device=x.device) if parts > 1 else None
    overlap, compute = overlaps_launches(x), compute_dtype(x)
    stages = config.stages if overlap else min(config.stages, 3)  # before Hopper an SM may have 99 KiB
    low, high = ("" if interpreted() else unpacking_words(weight.kind, upper, compute) for upper in (False, True))
    residual = None if residual is None else residual.contiguous()
    _columns_kernel[(triton.cdiv(N, config.block_m if gate is None else config.block_m // 2), parts)](
        x, weight.codes.view(torch.int16), weight.scale, weight.scale if weight.zero is None else weight.zero,
        x if bias is None else bias, x if residual is None else residual, out if sums is None else sums, N, rows,
        K=inputs, P=width, Q=weight.scale.shape[1], GROUP=weight.group, SHARED=weight.rows, KIND=weight.kind,
        ZERO=weight.zero is not None, M=config.block_m, BLOCK_B=block,
        TILES=triton.cdiv(triton.cdiv(width, block), parts), STAGES=stages,
        BLOCK_R=max(8, triton.next_power_of_2(rows)), PARTS=parts,
        AHEAD=min(config.ahead, triton.cdiv(width, parts)) if overlap else 0, GATE=gate or "",
        COMPUTE=compute, LOW=low, HIGH=high, BIAS=bias is not None, RESIDUAL=residual is not None, OVERLAP=overlap,
        enable_fp_fusion=True, num_warps=config.block_m // 16, **launch_options(overlap),
    )  # fmt: skip
    return out, sums


@on_device
def _added(sums: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Writes the sum of the parts, bias and residual into `out`, and returns that."""
    parts, rows, N = sums.shape
    overlap = overlaps_launches(out)
    _add_kernel[(rows, triton.cdiv(N, 256))](
        sums, out if bias is None else bias, out if residual is None else residual.contiguous(), out, N, rows,
        PARTS=parts, BLOCK_N=256, BIAS=bias is not None, RESIDUAL=residual is not None, OVERLAP=overlap,
        enable_fp_fusion=True, num_warps=2, **launch_options(overlap),
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _inputs(at, k, K: tl.constexpr, WHOLE: tl.constexpr, COMPUTE: tl.constexpr):
    """Inputs k of all rows: [inputs of a tile, BLOCK_R]."""
    if WHOLE:
        return tl.load(at).to(COMPUTE)
    else:
        return tl.load(at, mask=(k < K)[:, None], other=0).to(COMPUTE)


@triton.jit(do_not_specialize=["N", "rows"])
@no_type_check
def _columns_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr, N, rows,
    K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, COMPUTE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: M outputs (gated: M / 2 of each half) and one part of the inputs, of all rows."""
    EACH: tl.constexpr = 2 if KIND == "int4" else 1
    WHOLE: tl.constexpr = P == PARTS * TILES * BLOCK_B and K == P * EACH
    UNIT: tl.constexpr = GROUP // EACH  # bytes of a group
    OWN: tl.constexpr = M if GATE == "" else M // 2
    m = tl.arange(0, M)
    n = tl.minimum(tl.program_id(0) * OWN + m % OWN, N - 1) + m // OWN * N
    k = tl.arange(0, BLOCK_B * EACH)
    r = tl.minimum(tl.arange(0, BLOCK_R), rows - 1)
    begin = tl.program_id(1) * (TILES * BLOCK_B)
    word = tl.arange(0, BLOCK_B // 2)
    at = codes_ptr + n.to(tl.int64)[:, None] * (P // 2) + (begin // 2 + word)[None, :]  # [M, BLOCK_B / 2]
    x_at = x_ptr + r.to(tl.int64)[None, :] * K + (begin * EACH + k)[:, None]  # [inputs of a tile, BLOCK_R]
    owner = (n // SHARED).to(tl.int64) * Q
    if AHEAD:  # weights do not depend on the kernel before
        prefetch_starts(codes_ptr + (n.to(tl.int64) * P + tl.minimum(begin, P - AHEAD)) // 2, AHEAD // 2)
    if OVERLAP and GROUP != K:
        prefetch_starts(scale_ptr + owner, Q)
    scale = tl.load(scale_ptr + owner).to(tl.float32)
    zero = tl.zeros([M], tl.int32)
    if ZERO and GROUP == K:
        zero = tl.load(zero_ptr + owner).to(tl.int32)
    await_launch(OVERLAP)
    acc = tl.zeros([M, BLOCK_R], tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        byte = tile * BLOCK_B
        if WHOLE:
            codes = tl.load(at + byte // 2)
        else:
            codes = tl.load(at + byte // 2, mask=(begin + byte + 2 * word < P)[None, :], other=0)
        if GROUP != K:
            g = tl.minimum((begin + byte) // UNIT, Q - 1)
            scale = tl.load(scale_ptr + owner + g).to(tl.float32)
            if ZERO:
                zero = tl.load(zero_ptr + owner + g).to(tl.int32)
        w = convert_words(codes, LOW, KIND, False, COMPUTE)
        if KIND == "int4":
            high = convert_words(codes, HIGH, KIND, True, COMPUTE)
            w = tl.join(tl.reshape(w, [M, BLOCK_B // 16, 16]), tl.reshape(high, [M, BLOCK_B // 16, 16]))
            w = tl.reshape(tl.permute(w, [0, 1, 3, 2]), [M, 2 * BLOCK_B])
        if ZERO:
            w -= zero[:, None].to(COMPUTE)
        x = _inputs(x_at + byte * EACH, (begin + byte) * EACH + k, K, WHOLE, COMPUTE)
        # Not added up by the product, even where all tiles share a scale: Triton would then make w of the next tile, in
        # the same registers, before the product has read them.
        acc += tl.dot(w, x) * scale[:, None]
    column = tl.arange(0, BLOCK_R).to(tl.int64)
    n = tl.program_id(0) * OWN + tl.arange(0, OWN)
    place = column[None, :] * N + n[:, None]
    live = (n < N)[:, None] & (column < rows)[None, :]
    if PARTS > 1:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * rows * N + place, acc, mask=live)
    else:
        if GATE != "":
            out, second = tl.split(tl.permute(tl.reshape(acc, [2, OWN, BLOCK_R]), [1, 2, 0]))
            if BIAS:
                out += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
                second += tl.load(bias_ptr + N + n, mask=n < N, other=0).to(tl.float32)[:, None]
            out = activate(out, GATE) * second
        else:
            out = acc
            if BIAS:
                out += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
        if RESIDUAL:
            out += tl.load(residual_ptr + place, mask=live, other=0).to(tl.float32)
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["N", "rows"])
@no_type_check
def _add_kernel(
    sums_ptr, bias_ptr, residual_ptr, out_ptr, N, rows, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: some outputs of a row."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0).to(tl.int64)
    live = n < N
    await_launch(OVERLAP)
    out = add_parts(sums_ptr, row, n, live, N, rows, PARTS)
    if BIAS:
        out += tl.load(bias_ptr + n, mask=live, other=0).to(tl.float32)
    if RESIDUAL:
        out += tl.load(residual_ptr + row * N + n, mask=live, other=0).to(tl.float32)
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=live)
