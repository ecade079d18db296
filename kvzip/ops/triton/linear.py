"""The linear layer on the GPU: one row by a kernel of its own, more rows by cuBLAS."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.codes import expand_triton, suits, widen, widening
from kvzip.ops.triton.common import (
    activate,
    await_launch,
    check_dtype,
    interpreted,
    launch_options,
    on_device,
    overlaps_launches,
    prefetch_starts,
)
from kvzip.ops.triton.gate import gated
from kvzip.ops.triton.linear_columns import few_columns, takes_columns
from kvzip.ops.triton.linear_integers import has_integers, integer_row
from kvzip.ops.triton.linear_quantized import few_rows, most_rows
from kvzip.ops.triton.linear_rounded import rounded_product
from kvzip.ops.triton.norm import rms_norm_triton
from kvzip.ops.triton.rotary import NO_ROTATION, Rotation, load_angles, store_rotated
from kvzip.ops.types import Norm
from kvzip.ops.weights import QuantizedWeight, blocks, round_inputs

_AT_ONCE = 1 << 27  # quantized weights expanded at once
_SLICED = 16  # the most rows that `few_rows` takes


class Launch(NamedTuple):
    """Sizes of one launch: outputs and inputs of a tile, warps, loads in flight, inputs of each row prefetched."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    ahead: int


LAUNCHES = (
    Launch(8, 512, 2, 3, 2048),
    Launch(4, 1024, 2, 3, 2048),
    Launch(4, 1024, 2, 5, 1024),
    Launch(4, 1024, 1, 5, 2048),
    Launch(4, 1024, 1, 5, 4096),
    Launch(4, 1024, 2, 4, 2048),
    Launch(4, 512, 1, 5, 1024),
    Launch(8, 512, 2, 5, 2048),
    Launch(8, 1024, 4, 3, 1024),
    Launch(2, 1024, 1, 5, 2048),
)
"""What `benchmarks/ops.py --only linear --launches` times for one row of 8-bit codes."""


def launch_config(N: int, K: int, kind: str = "", *, norm: bool = False) -> Launch:
    """The launch for one row, N outputs and K inputs, of a kind of codes or none.

    Tuned on an H100, 2026-11-24 and, within steps, on 2026-11-28: docs/tuning.md.
    """
    if kind and N > 8192:
        return Launch(4, 1024, 2, 5, 1024)
    if kind and norm:
        return Launch(8, 512, 2, 3, 2048)  # what norms x is read by every program: fewer of them
    if kind:
        return Launch(4, 1024, 1, 5, 2048 if kind == "e4m3" else 4096) if K >= 8192 else Launch(4, 1024, 2, 3, 2048)
    if K > 8192:
        return Launch(8, 1024, 8, 3, 1024)  # long rows: more outputs share what is read of x
    # many short rows: smaller tiles balance better
    return Launch(4, 1024 if N >= 8192 and K <= 4096 else 2048, 4, 3, 1024)


@on_device
def linear_triton(
    x: Float[Tensor, "*b K"],
    weight: Float[Tensor, "N K"] | QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
) -> Float[Tensor, "*b M"]:
    """`linear`: norm(x) W^T + bias, gated, plus residual.

    One row is one launch that reads every weight once (N K values, 2 N K operations) and fuses the rest: x times the
    norm's weight is multiplied by W, and the norm's factor is applied to the sums. The next kernel may start early
    and prefetch its weights to L2 (programmatic dependent launch). More rows go to cuBLAS,
    between fused elementwise kernels; there the product adds the residual, in float32. Measured: docs/tuning.md.
    Quantized weights: `_quantized`.
    """
    check_dtype(x)
    run = row_kernel(x, weight, norm)
    if run is not None:
        return run(x, weight, bias, norm=norm, gate=gate, residual=residual)
    if isinstance(weight, QuantizedWeight):
        return _quantized(x, weight, bias, norm, gate, residual)
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    x = normed(x, norm)
    if residual is not None and bias is None and gate is None:
        flat = torch.addmm(residual.reshape(rows, -1), x.reshape(rows, -1), weight.t())
        return flat.view(residual.shape)
    out = F.linear(x, weight, bias)
    return _finished(out, gate, residual)


def has_columns(x: Float[Tensor, "*b K"], weight: Float[Tensor, "N K"] | QuantizedWeight) -> bool:
    """Whether `linear_columns` has the kernel for these."""
    if isinstance(weight, Tensor) or weight.activations is not None:
        return False
    rows = x.numel() // weight.inputs if weight.inputs else 0
    return 0 < rows <= most_rows(x) and suits(weight) and takes_columns(weight, rows, x)


def row_kernel(
    x: Float[Tensor, "*b K"], weight: Float[Tensor, "N K"] | QuantizedWeight, norm: Norm | None
) -> Callable[..., Tensor] | None:
    """The kernel for one row, `one_row` or `integer_row`; None where there are more, or neither takes the weight."""
    check_dtype(x)
    if not x.numel() or x.numel() != x.shape[-1]:
        return None
    if isinstance(weight, Tensor):
        return one_row if weight.is_contiguous() else None
    if weight.activations is not None:
        return None
    if has_integers(weight, x, norm):
        return integer_row
    return one_row if has_plain_codes(weight) else None


@on_device
def one_row(
    x: Float[Tensor, "*b K"],
    weight: Float[Tensor, "N K"] | QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
    rotation: Rotation = NO_ROTATION,
    config: Launch | None = None,
) -> Float[Tensor, "*b M"]:
    """`linear` of one row, with plain weights or those that `has_plain_codes`; heads are rotated with `rotation`."""
    (N, K), kind = weight.shape, weight.kind if isinstance(weight, QuantizedWeight) else ""
    config = config or launch_config(N, K, kind, norm=norm is not None)
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], N if gate is None else N // 2), dtype=x.dtype, device=x.device)
    block_n = rotation.pairs(config.block_n) if rotation.half else config.block_n
    N = N if gate is None and not rotation.half else N // 2
    overlap = overlaps_launches(x)
    data, scale = (weight.codes.view(torch.uint8), weight.scale) if isinstance(weight, QuantizedWeight) else (weight, x)
    _row_kernel[(triton.cdiv(N, block_n),)](
        x, data, scale, x if bias is None else bias, x if norm is None else norm.weight,
        x if residual is None else residual.contiguous(), out, rotation.args,
        N, rotation.capacity, 0.0 if norm is None else float(norm.eps),
        K=K, BLOCK_N=block_n, BLOCK_K=min(config.block_k, triton.next_power_of_2(K)), STAGES=config.stages,
        AHEAD=min(config.ahead, K) if overlap else 0, OFFSET=0 if norm is None else norm.offset,
        NORM=norm is not None, GATE=gate or "", BIAS=bias is not None, RESIDUAL=residual is not None,
        HALF=rotation.half, HEADS=rotation.heads, KV_HEADS=rotation.kv_heads, TAIL=rotation.tail, KIND=kind,
        ASM=widening(kind) if kind and overlap and not interpreted() else "", OVERLAP=overlap,
        num_warps=config.warps, enable_fp_fusion=True, **launch_options(overlap),
    )  # fmt: skip
    return out


def has_plain_codes(weight: QuantizedWeight) -> bool:
    """Whether a weight is 8-bit codes with one scale for each output, without zero points."""
    plain = weight.kind != "int4" and weight.zero is None and weight.codes.is_contiguous()
    return plain and weight.group == weight.inputs and weight.rows == 1


def _quantized(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    norm: Norm | None,
    gate: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`linear` with quantized weights where none of `row_kernel` fits: up to 64 rows as one launch, more with weights
    expanded to x's dtype.

    Where inputs are rounded too, many rows are multiplied in 8 bits if a library can.
    """
    outputs, inputs = weight.shape
    rows = x.numel() // inputs if inputs else 0
    if weight.activations is not None:
        x = normed(x, norm)
        flat = rounded_product(x.reshape(rows, -1), weight) if rows > most_rows(x) else None
        if flat is not None:
            out = flat.view(*x.shape[:-1], outputs)
            return _finished(out if bias is None else out + bias, gate, residual)
        x = round_inputs(x, weight.activations)
        return linear_triton(x, replace(weight, activations=None), bias, gate=gate, residual=residual)
    if has_columns(x, weight):
        return few_columns(normed(x, norm), weight, bias, gate=gate, residual=residual)
    if 0 < rows <= min(most_rows(x), _SLICED) and suits(weight):
        return few_rows(x, weight, bias, norm=norm, gate=gate, residual=residual)
    x = normed(x, norm)
    parts = blocks(weight, _AT_ONCE)
    if len(parts) <= 1:
        whole = expand_triton(weight, x.dtype, start=0, stop=outputs)
        if rows != 1:
            return linear_triton(x, whole, bias, gate=gate, residual=residual)
        out = F.linear(x, whole, bias)
    else:
        out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
        for start, stop in parts:
            part = expand_triton(weight, x.dtype, start=start, stop=stop)
            out[..., start:stop] = F.linear(x, part, None if bias is None else bias[start:stop])
    return _finished(out, gate, residual)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x, normed if there is a norm."""
    return x if norm is None else rms_norm_triton(x, norm.weight, eps=norm.eps, offset=norm.offset)


def _finished(out: Tensor, gate: str | None, residual: Tensor | None) -> Tensor:
    """What follows a product and its bias."""
    out = out if gate is None else gated(out, gate)
    return out if residual is None else residual + out


@triton.jit
@no_type_check
def _tile(at, n, k, N, K: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Weights of some outputs and inputs, zeros outside, in float32 and of codes without scales: [BLOCK_N, BLOCK_K]."""
    at += n.to(tl.int64)[:, None] * K + k[None, :]
    if K % BLOCK_K == 0:
        found = tl.load(at, mask=(n < N)[:, None], other=0)
    else:
        found = tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0)
    if KIND == "":
        return found.to(tl.float32)
    else:
        return widen(found, ASM, KIND)


@triton.jit(do_not_specialize=["N", "capacity"])
@no_type_check
def _row_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, rotation, N, capacity, eps,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    OFFSET: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TAIL: tl.constexpr,
    KIND: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of one row; or pairs of outputs, of the gate's halves or of halves of heads."""
    PAIRS: tl.constexpr = GATE != "" or HALF > 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    apart, end = N, N  # of a pair's outputs; where first ones end
    if HALF:
        n += n // HALF * HALF
        apart, end = N * 0 + HALF, 2 * N
    second_ptr = weight_ptr + apart.to(tl.int64) * K
    if AHEAD:  # weights do not depend on the kernel before
        row = tl.minimum(n, end - 1).to(tl.int64) * K
        prefetch_starts(weight_ptr + row, AHEAD)
        if PAIRS:
            prefetch_starts(second_ptr + row, AHEAD)
    scale, bias, residual = 1.0, 0.0, 0.0  # loaded here, as at the end all would wait for them
    scale_2, bias_2 = scale, bias
    if KIND != "":
        scale = tl.load(scale_ptr + n, mask=n < end, other=0).to(tl.float32)
        if PAIRS:
            scale_2 = tl.load(scale_ptr + apart + n, mask=n < end, other=0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < end, other=0).to(tl.float32)
        if PAIRS:
            bias_2 = tl.load(bias_ptr + apart + n, mask=n < end, other=0).to(tl.float32)
    await_launch(OVERLAP)
    if RESIDUAL:
        residual = tl.load(residual_ptr + n, mask=n < end, other=0).to(tl.float32)
    if HALF:
        angles = load_angles(rotation, n, HALF, TAIL)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_2 = acc
    square = tl.zeros([BLOCK_K], tl.float32)
    for at in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = at + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0).to(tl.float32)  # [BLOCK_K]
        if NORM:
            square += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0).to(tl.float32) + OFFSET
        acc += _tile(weight_ptr, n, k, end, K, BLOCK_K, KIND, ASM) * x[None, :]
        if PAIRS:
            acc_2 += _tile(second_ptr, n, k, end, K, BLOCK_K, KIND, ASM) * x[None, :]
    factor = 1.0
    if NORM:
        factor = 1 / tl.sqrt_rn(tl.sum(square, 0) / K + eps)
    out = tl.sum(acc, 1) * factor * scale + bias  # [BLOCK_N]
    if PAIRS:
        out_2 = tl.sum(acc_2, 1) * factor * scale_2 + bias_2
        if GATE != "":
            out = activate(out, GATE) * out_2
    out += residual
    if HALF:
        store_rotated(out, out_2, n, angles, out_ptr, rotation, capacity, HALF, HEADS, KV_HEADS, TAIL)
    else:
        tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < end)
