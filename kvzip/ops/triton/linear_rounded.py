"""Products of many rows in 8 bits, inputs rounded too: for `activations`."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import await_launch, launch_options, on_device, overlaps_launches
from kvzip.ops.weights import Activations, QuantizedWeight

_BLOCK = 128  # inputs, and outputs, that share a scale in products by blocks


class Launch(NamedTuple):
    """Sizes of one launch: rows and outputs of a tile, warps, tiles of 128 inputs in flight."""

    block_r: int
    block_n: int
    warps: int
    stages: int


LAUNCHES = (
    Launch(128, 256, 8, 3),
    Launch(128, 128, 8, 4),
    Launch(128, 128, 4, 4),
    Launch(128, 256, 8, 4),
    Launch(256, 128, 8, 3),
    Launch(128, 128, 8, 3),
    Launch(64, 128, 4, 4),
)
"""What was tried of them on an H100: docs/tuning.md."""


def launch_config(grouped: bool, *, hopper: bool = True) -> Launch:
    """The launch for products of many rows in 8 bits."""
    return Launch(128, 256, 8, 3) if hopper and not grouped else Launch(128, 128, 8, 4 if hopper else 3)


def rounded_product(x: Float[Tensor, "R K"], weight: QuantizedWeight) -> Float[Tensor, "R N"] | None:
    """Returns round(x) W^T for a weight with `activations`; None where no library has such a product.

    int8 with a scale for each output and token; e4m3 with those, on Hopper also by blocks of 128.
    """
    how = weight.activations
    outputs, inputs = weight.shape
    whole = weight.group == inputs and weight.rows == 1
    fits = how is not None and how.symmetric and weight.zero is None and how.zero is None and how.kind == weight.kind
    if not fits or x.shape[0] <= 16 or inputs % 16 or outputs % 16 or x.dtype == torch.float32:
        return None
    if how.kind == "int8":
        return _products(x, weight, how) if whole and how.group is None else None
    ready = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)
    if ready and whole and how.group is None and x.dtype == torch.bfloat16:
        codes, scale = round_rows(x, how)
        own = weight.scale.float().t().contiguous()
        column = scale.reshape(-1).view(-1, 1)
        return torch._scaled_mm(codes, weight.codes.t(), scale_a=column, scale_b=own, out_dtype=x.dtype)
    blocks = weight.group == how.group == _BLOCK and weight.rows == _BLOCK
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    if blocks and hopper and inputs % (4 * _BLOCK) == 0 and outputs % _BLOCK == 0:
        return _products(x, weight, how)
    return None


@on_device
def _products(x: Tensor, weight: QuantizedWeight, how: Activations, config: Launch | None = None) -> Tensor:
    """By a kernel of our own: one scale for each row and output, or for each of their groups of 128 inputs."""
    rows, (outputs, inputs), grouped = x.shape[0], weight.shape, how.group is not None
    codes, scale = round_rows(x, how)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    overlap = overlaps_launches(x)  # from Hopper on
    config = config or launch_config(grouped, hopper=overlap)
    tiles = triton.cdiv(rows, config.block_r), triton.cdiv(outputs, config.block_n)
    _product_kernel[(tiles[0] * tiles[1],)](
        codes, weight.codes, scale, weight.scale, out, rows, scale.stride(0), scale.stride(1),
        N=outputs, K=inputs, Q=weight.scale.shape[1], SHARED=weight.rows, GROUPED=grouped,
        BLOCK_R=config.block_r, BLOCK_N=config.block_n, BLOCK_K=_BLOCK, STAGES=config.stages, OVERLAP=overlap,
        num_warps=config.warps, enable_fp_fusion=True, **launch_options(overlap),
    )  # fmt: skip
    return out


@on_device
def round_rows(x: Float[Tensor, "R K"], how: Activations) -> tuple[Tensor, Float[Tensor, "R Q"]]:
    """Returns the codes of rows and their scales, those of one group of all rows beside each other in memory."""
    x = x.contiguous()
    rows, inputs = x.shape
    groups = 1 if how.group is None else triton.cdiv(inputs, how.group)
    dtype = torch.float8_e4m3fn if how.kind == "e4m3" else torch.int8
    codes = torch.empty((rows, inputs), dtype=dtype, device=x.device)
    scale = torch.empty((groups, rows), dtype=torch.float32, device=x.device)
    overlap = overlaps_launches(x)
    block = min(2048, triton.next_power_of_2(inputs)) if how.group is None else how.group
    _round_kernel[(rows, groups)](
        x, codes.view(torch.uint8), scale, scale if how.scale is None else how.scale, rows, float(how.steps),
        float(how.bound or 0.0), K=inputs, GROUP=how.group or inputs, BLOCK=block, KIND=how.kind,
        STATIC=how.scale is not None, BOUND=how.bound is not None, OVERLAP=overlap,
        num_warps=4 if how.group is None else 1, enable_fp_fusion=False, **launch_options(overlap),
    )  # fmt: skip
    return codes, scale.t()


@triton.jit
@no_type_check
def _to_integer(x):
    """The nearest integer, ties to even, of small numbers."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
@no_type_check
def _e4m3(x):
    """The bytes of the nearest numbers with 4 bits of exponent and 3 of mantissa: before Hopper there is no cast."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 128
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 120 * 8
    small = _to_integer(size * 512).to(tl.int32)  # below 2 ** -6 steps are even
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def _round_kernel(
    x_ptr, codes_ptr, scale_ptr, static_ptr, rows, steps, bound, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr, STATIC: tl.constexpr, BOUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: a group of one row. What is not finite makes its scale NaN."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    await_launch(OVERLAP)
    begin = group * GROUP
    top = tl.zeros([BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.float32)
    for start in range(0, GROUP, BLOCK):
        k = begin + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * K + k, mask=k < K, other=0).to(tl.float32)
        top = tl.maximum(top, tl.abs(x))
        wrong += x * 0
    if STATIC:
        scale = tl.load(static_ptr)
    else:
        largest = tl.max(top, 0)
        if BOUND:
            largest = tl.minimum(largest, bound)
        scale = tl.div_rn(largest, steps)
    divisor = tl.where(scale > 0, scale, 1.0)
    tl.store(scale_ptr + group.to(tl.int64) * rows + row, scale + tl.sum(wrong, 0))
    for start in range(0, GROUP, BLOCK):
        k = begin + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * K + k, mask=k < K, other=0).to(tl.float32)
        code = tl.div_rn(x, tl.zeros([BLOCK], tl.float32) + divisor)
        if KIND == "e4m3":
            tl.store(codes_ptr + row * K + k, _e4m3(code), mask=k < K)
        else:
            code = _to_integer(tl.minimum(tl.maximum(code, -128.0), 127.0))
            tl.store(codes_ptr + row * K + k, code.to(tl.int8).to(tl.uint8, bitcast=True), mask=k < K)


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def _product_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, out_ptr, rows, x_scale_row, x_scale_group, N: tl.constexpr, K: tl.constexpr,
    Q: tl.constexpr, SHARED: tl.constexpr, GROUPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the product. Eight tiles of rows go through all outputs, so that L2 keeps their codes."""
    program, across = tl.program_id(0), (N + BLOCK_N - 1) // BLOCK_N
    band = program // (8 * across)
    high = tl.minimum(8, (rows + BLOCK_R - 1) // BLOCK_R - band * 8)
    inside = program - band * 8 * across
    r = ((band * 8 + inside % high) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    n = (inside // high * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row, output, k = tl.minimum(r, rows - 1), tl.minimum(n, N - 1), tl.arange(0, BLOCK_K)
    x_at, w_at = x_ptr + row[:, None] * K + k[None, :], w_ptr + output[None, :] * K + k[:, None]
    x_scale_at, w_scale_at = x_scale_ptr + row * x_scale_row, w_scale_ptr + output // SHARED * Q
    await_launch(OVERLAP)
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32 if GROUPED or x_ptr.dtype.element_ty != tl.int8 else tl.int32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            x = tl.load(x_at + start)
            w = tl.load(w_at + start)
        else:
            x = tl.load(x_at + start, mask=(start + k < K)[None, :], other=0)
            w = tl.load(w_at + start, mask=(start + k < K)[:, None], other=0)
        if GROUPED:
            scale = tl.load(x_scale_at + start // BLOCK_K * x_scale_group)[:, None]
            scale = scale * tl.load(w_scale_at + start // BLOCK_K).to(tl.float32)[None, :]
            acc += tl.dot(x, w).to(tl.float32) * scale
        else:
            acc = tl.dot(x, w, acc)
    out = acc.to(tl.float32)
    if not GROUPED:
        out *= tl.load(x_scale_at)[:, None] * tl.load(w_scale_at).to(tl.float32)[None, :]
    at = out_ptr + r[:, None] * N + n[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (n < N)[None, :])
