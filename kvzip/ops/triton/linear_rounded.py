"""Products of many rows in 8 bits, inputs rounded too, by the libraries that torch brings: for `activations`."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import await_launch, launch_options, on_device, overlaps_launches
from kvzip.ops.weights import Activations, QuantizedWeight

_BLOCK = 128  # inputs, and outputs, that share a scale in products by blocks
_VALUES = 2048  # that a program rounds at a time
_ROWS = 2048  # whose integer sums, 4 bytes each, are held at once


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
        return _integers(x, weight, how) if whole and how.group is None else None
    ready = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)
    if ready and whole and how.group is None and x.dtype == torch.bfloat16:
        codes, scale = round_rows(x, how)
        own = weight.scale.float().t().contiguous()
        column = scale.reshape(-1).view(-1, 1)
        return torch._scaled_mm(codes, weight.codes.t(), scale_a=column, scale_b=own, out_dtype=x.dtype)
    blocks = weight.group == how.group == _BLOCK and weight.rows == _BLOCK
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    if blocks and hopper and inputs % (4 * _BLOCK) == 0 and outputs % _BLOCK == 0:
        return _by_blocks(x, weight, how)
    return None


@on_device
def _integers(x: Tensor, weight: QuantizedWeight, how: Activations) -> Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    scale = weight.scale[:, 0].float()
    for start in range(0, x.shape[0], _ROWS):
        stop = min(start + _ROWS, x.shape[0])
        first = min(start, max(0, stop - 32))  # the library takes no fewer than 17 rows
        codes, own = round_rows(x[first:stop], how)
        sums = torch._int_mm(codes, weight.codes.t())
        overlap = overlaps_launches(x)
        _rescale_kernel[(stop - first, triton.cdiv(weight.shape[0], 1024))](
            sums, own, scale, out[first:stop], N=weight.shape[0], BLOCK=1024, OVERLAP=overlap, num_warps=4,
            **launch_options(overlap),
        )  # fmt: skip
    return out


def _by_blocks(x: Tensor, weight: QuantizedWeight, how: Activations) -> Tensor:
    rows = x.shape[0]
    if rows % 4:  # the library takes rows in fours
        x = torch.nn.functional.pad(x, (0, 0, 0, -rows % 4))
    codes, scale = round_rows(x, how)
    kind = torch.nn.functional.ScalingType
    own = weight.scale.float().contiguous().t()
    return torch.nn.functional.scaled_mm(
        codes, weight.codes.t(), scale, kind.BlockWise1x128, own, kind.BlockWise128x128, output_dtype=x.dtype
    )[:rows]


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
    block = min(_VALUES, triton.next_power_of_2(inputs if how.group is None else how.group))
    each = min(_VALUES // block, triton.next_power_of_2(groups))
    _round_kernel[(rows, triton.cdiv(groups, each))](
        x, codes.view(torch.uint8), scale, scale if how.scale is None else how.scale, rows, float(how.steps),
        float(how.bound or 0.0), K=inputs, GROUP=how.group or inputs, GROUPS=groups, EACH=each, BLOCK=block,
        KIND=how.kind, STATIC=how.scale is not None, BOUND=how.bound is not None, OVERLAP=overlap,
        num_warps=4, enable_fp_fusion=False, **launch_options(overlap),
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
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, STATIC: tl.constexpr,
    BOUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: EACH groups of one row, BLOCK values of each at a time. What is not finite makes a scale NaN."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * EACH + tl.arange(0, EACH)
    await_launch(OVERLAP)
    within = tl.arange(0, BLOCK)
    top = tl.zeros([EACH, BLOCK], tl.float32)
    wrong = tl.zeros([EACH, BLOCK], tl.float32)
    for start in range(0, GROUP, BLOCK):
        k = (group * GROUP + start)[:, None] + within[None, :]
        live = (k < K) & (start + within < GROUP)[None, :]
        x = tl.load(x_ptr + row * K + k, mask=live, other=0).to(tl.float32)
        top = tl.maximum(top, tl.abs(x))
        wrong += x * 0
    if STATIC:
        scale = tl.load(static_ptr) + tl.zeros([EACH], tl.float32)
    else:
        largest = tl.max(top, 1)
        if BOUND:
            largest = tl.minimum(largest, bound)
        scale = tl.div_rn(largest, tl.zeros([EACH], tl.float32) + steps)
    divisor = tl.where(scale > 0, scale, 1.0)
    tl.store(scale_ptr + group.to(tl.int64) * rows + row, scale + tl.sum(wrong, 1), mask=group < GROUPS)
    for start in range(0, GROUP, BLOCK):
        k = (group * GROUP + start)[:, None] + within[None, :]
        live = (k < K) & (start + within < GROUP)[None, :]
        x = tl.load(x_ptr + row * K + k, mask=live, other=0).to(tl.float32)
        code = tl.div_rn(x, tl.zeros([EACH, BLOCK], tl.float32) + divisor[:, None])
        if KIND == "e4m3":
            tl.store(codes_ptr + row * K + k, _e4m3(code), mask=live)
        else:
            code = _to_integer(tl.minimum(tl.maximum(code, -128.0), 127.0))
            tl.store(codes_ptr + row * K + k, code.to(tl.int8).to(tl.uint8, bitcast=True), mask=live)


@triton.jit
@no_type_check
def _rescale_kernel(
    sums_ptr, row_scale_ptr, scale_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    await_launch(OVERLAP)
    sums = tl.load(sums_ptr + row * N + n, mask=n < N, other=0).to(tl.float32)
    out = sums * tl.load(row_scale_ptr + row) * tl.load(scale_ptr + n, mask=n < N, other=0)
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)
