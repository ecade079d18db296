"""What the attention kernels share."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which has no inline assembly and a wrong bfloat16 product."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Every function that launches a kernel has this decorator: it launches where its first argument is.

    Triton launches on the current device and that device's current stream, wherever the tensors are; torch's own
    operations change the device themselves. Where the device is current already, which is the case in a capture too,
    this costs two calls that read numbers.

    Args:
        launcher: its first argument is a tensor, or quantized rows or weights.
    """
    name = next(iter(inspect.signature(launcher).parameters))

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs[name]
        index = getattr(first, "codes", first).get_device()  # -1 on the CPU
        if index < 0 or index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(index):
            return launcher(*args, **kwargs)

    return launch


def compute_dtype(x: Tensor) -> tl.dtype:
    """The dtype in which a kernel multiplies values of x.

    Raises: ValueError for float64, which the kernels do not have.
    """
    return getattr(tl, compute_name(x))


def compute_name(x: Tensor) -> str:
    """The name of `compute_dtype(x)` in `triton.language`, and in torch. Raises ValueError as that does."""
    check_dtype(x)
    if x.dtype == torch.bfloat16 and interpreted():
        return "float32"
    return str(x.dtype).removeprefix("torch.")


@getattr(triton, "constexpr_function", lambda function: function)  # Triton before 3.5 can interpret alone
def dtype_of(name):  # no types: what Triton reads has none
    """In a kernel, the dtype of a name in `triton.language`."""
    return getattr(tl, name)


def check_dtype(x: Tensor) -> None:
    """Raises: ValueError for float64, which the kernels do not have."""
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"expected float16, bfloat16 or float32, got {x.dtype}: KVZIP_BACKEND=reference takes other dtypes"
        )


def overlaps_launches(x: Tensor) -> bool:
    """Whether a kernel on x's device may start while the one before it ends (programmatic dependent launch)."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def launch_options(overlap: bool) -> dict[str, bool]:
    """Launch options for programmatic dependent launch: the kernel may start early, and calls `await_launch`."""
    return {"launch_pdl": True} if overlap else {}


def shared_memory(size_bytes: int) -> str:
    """The argument of `reserve`."""
    return f"{{ .shared .align 1024 .b8 reserved[{size_bytes}]; mov.u32 $0, reserved; }}" if size_bytes else ""


@triton.jit
@no_type_check
def reserve(SHARED: tl.constexpr):
    """Takes shared memory that nothing uses, so that fewer programs fit on an SM at once."""
    if SHARED != "":
        tl.inline_asm_elementwise(SHARED, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


def check_rows(**tensors: Tensor) -> None:
    """Raises: ValueError for a tensor whose last axis is not contiguous."""
    for name, x in tensors.items():
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"expected {name} with a contiguous last axis, got strides {x.stride()}: make it contiguous"
            )


@triton.jit
@no_type_check
def await_launch(OVERLAP: tl.constexpr):
    """Lets the next kernel start early, then waits until all that the one before wrote is there.

    Every kernel launched with `launch_options(True)` calls it before it touches memory that other kernels write. So
    when it returns, all earlier kernels have finished, not only the last one.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
@no_type_check
def exp2(x, EXACT: tl.constexpr):
    """2 ** x; EXACT: within half an ulp (Taylor series of degree 7 around integers), else the device's, within two."""
    if EXACT:
        least = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
        whole = tl.floor(least + 0.5)
        f = (least - whole) * LN_2
        series = f * (1 / 5040) + 1 / 720
        series = series * f + 1 / 120
        series = series * f + 1 / 24
        series = series * f + 1 / 6
        series = (series * f + 0.5) * f * f + f + 1
        power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(x < -126, 0.0, series * power)
    else:
        return tl.exp2(x)


@triton.jit
@no_type_check
def tanh(x):
    """tanh to float32 accuracy: an odd polynomial (Cephes) near 0, where 1 - e^-2x would cancel."""
    z = x * x
    near = z * -5.70498872745e-3 + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = (near * z - 3.33332819422e-1) * z * x + x
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
@no_type_check
def activate(x, GATE: tl.constexpr):
    """silu(x), or gelu(x) by its formula with tanh."""
    if GATE == "silu":
        return x / (1 + tl.exp(-x))
    else:
        return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
@no_type_check
def product(a, b):
    """a @ b.T with float32 sums; for float32 rows by partial sums of 32 products, as one long sum rounds more."""
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[0]
    D: tl.constexpr = a.shape[1]
    if D > 32 and a.dtype == tl.float32:
        a_parts = tl.permute(tl.reshape(a, [M, D // 32, 32]), [1, 0, 2])
        b_parts = tl.permute(tl.reshape(b, [N, D // 32, 32]), [1, 2, 0])
        return tl.sum(tl.dot(a_parts, b_parts, input_precision="ieee"), 0)
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
@no_type_check
def add_product(total, a, b):
    """total + a @ b; float32 products are summed before total is added, or each would round at total's magnitude."""
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, total)  # `+` would be fused into the dot
    else:
        return tl.dot(a, b, total)


@triton.jit
@no_type_check
def add_parts(sums_ptr, row, n, live, N, rows, PARTS: tl.constexpr):
    """Outputs n of a row: the sums [PARTS, rows, N] over each part of the inputs added up; zeros where not live."""
    total = tl.zeros(n.shape, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums_ptr + (tl.full([], part, tl.int64) * rows + row) * N + n, mask=live, other=0)
    return total


@triton.jit
@no_type_check
def load_rows(ptr, rows, columns, stride, bound, MASKED: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows of W values, padded with zeros to BLOCK_W; with MASKED, rows at and after bound are zeros too."""
    at = ptr + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        if W == BLOCK_W:
            return tl.load(at, mask=(rows < bound)[:, None], other=0)
        else:
            return tl.load(at, mask=(rows < bound)[:, None] & (columns < W)[None, :], other=0)
    else:
        if W == BLOCK_W:
            return tl.load(at)
        else:
            return tl.load(at, mask=(columns < W)[None, :], other=0)


@triton.jit
@no_type_check
def prefetch(addresses):
    """Prefetches what is at 64-bit addresses, or behind pointers as numbers, to L2. It uses no value."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
@no_type_check
def prefetch_starts(rows, AHEAD: tl.constexpr):
    """Prefetches the first AHEAD values of rows, given by pointers, to L2, 128 bytes at a time."""
    EACH: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    a = tl.minimum(tl.arange(0, triton.next_power_of_2((AHEAD + EACH - 1) // EACH)) * EACH, AHEAD - 1)
    prefetch((rows[:, None] + a[None, :]).to(tl.int64))
