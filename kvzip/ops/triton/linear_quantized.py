"""The linear layer with weights in 8 or 4 bits: few rows by a kernel that expands codes in registers, more by cuBLAS.

Weights are the rows (M) of tensor cores' products, so that eight columns are enough for one row of x. The inputs of a tile
are cut into slices, one for each warp, whose sums are added at the end: then few outputs make a program, and many
programs share the reading evenly. Scales multiply sums of a group, codes themselves are exact in 16 bits.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import (
    activate,
    await_launch,
    compute_dtype,
    interpreted,
    launch_options,
    overlaps_launches,
)
from kvzip.ops.triton.norm import rms_norm_triton
from kvzip.ops.types import Norm
from kvzip.ops.weights import QuantizedWeight, expand



class Launch(NamedTuple):
    """Sizes of one launch: outputs and bytes of a slice, slices of a tile, warps, tiles in flight, bytes fetched ahead."""

    block_n: int
    block_bytes: int
    slices: int
    warps: int
    stages: int
    ahead: int = 1024  # of each row, to L2, before the wait for the launch in front
    fused: bool = True  # whether one row is normed within, not by a launch before


_VARIANTS = (
    Launch(16, 64, 4, 4, 4),  # fewest instructions for a weight among the small programs, which balance best
    Launch(16, 64, 4, 4, 8),
    Launch(16, 128, 4, 4, 4),
    Launch(32, 64, 4, 4, 4),
    Launch(32, 128, 4, 4, 3),
    Launch(16, 64, 2, 2, 8),
    Launch(16, 64, 4, 4, 4, ahead=0),
    Launch(16, 64, 4, 4, 4, ahead=4096),
    Launch(16, 64, 4, 4, 4, fused=False),
    Launch(16, 128, 4, 4, 4, fused=False),
)
LAUNCHES = {"e4m3": _VARIANTS, "int8": _VARIANTS, "int4": _VARIANTS}
"""What may be launched for one row, by kind; the first is taken. All compile without spills; none is timed yet:
`benchmarks/ops.py --only linear --launches` times each."""


def launch_config(kind: str, rows: int, group: int, x: Tensor) -> Launch:
    """The launch for so many rows of x; a slice never crosses a group."""
    config = LAUNCHES[kind][0]
    if x.dtype == torch.float32:
        config = Launch(16, 32, 4, 4, 2)  # plain products without tensor cores
    elif rows > 16:
        wide = 32 if kind == "int4" else 64  # bytes; more take nearly all registers, or spill
        config = Launch(32 if rows <= 32 else 16, wide, 4, 4, 3)
    unit = group // 2 if kind == "int4" else group
    while unit % config.block_bytes:
        config = config._replace(block_bytes=config.block_bytes // 2)
    return config


def most_rows(x: Tensor) -> int:
    """The most rows that the kernel takes; with more of float32 its registers do not suffice."""
    return 8 if x.dtype == torch.float32 else 64


def suits(weight: QuantizedWeight) -> bool:
    """Whether the kernels take a weight: its groups are all inputs, or whole tiles of 16 bytes."""
    each = 32 if weight.kind == "int4" else 16
    return (weight.group == weight.inputs or weight.group % each == 0) and weight.codes.is_contiguous()


def few_rows(
    x: Float[Tensor, "*b K"],
    weight: QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
    config: Launch | None = None,
) -> Float[Tensor, "*b M"]:
    """`linear` of 1 to 64 rows as one launch that reads every code once; several rows are normed by a launch before."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    x = x.contiguous()
    whole = weight.group == inputs  # one scale for each output: it multiplies the sums
    config = config or launch_config(weight.kind, rows, weight.group if not whole else 1 << 30, x)
    if norm is not None and (rows > 1 or not config.fused):
        x, norm = rms_norm_triton(x, norm.weight, eps=norm.eps, offset=norm.offset), None
    N = outputs if gate is None else outputs // 2
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    overlap, compute = overlaps_launches(x), compute_dtype(x)
    packed = not interpreted() and x.dtype != torch.float32
    low, high = (unpacking(weight.kind, high, compute) if packed else "" for high in (False, True))
    _quantized_kernel[(triton.cdiv(N, config.block_n),)](
        x, weight.codes.view(torch.uint8), weight.scale, weight.scale if weight.zero is None else weight.zero,
        x if bias is None else bias, x if norm is None else norm.weight,
        x if residual is None else residual.contiguous(), out, N, rows, 0.0 if norm is None else float(norm.eps),
        K=inputs, P=weight.codes.shape[1], Q=weight.scale.shape[1], GROUP=weight.group, SHARED=weight.rows,
        KIND=weight.kind, ZERO=weight.zero is not None, WHOLE=whole,
        BLOCK_N=config.block_n, BLOCK_B=config.block_bytes, SLICES=config.slices, STAGES=config.stages,
        BLOCK_R=max(8, triton.next_power_of_2(rows)), ONE=rows == 1,
        AHEAD=min(config.ahead, weight.codes.shape[1]) if overlap else 0,
        OFFSET=0 if norm is None else norm.offset, NORM=norm is not None, GATE=gate or "", BIAS=bias is not None,
        RESIDUAL=residual is not None, COMPUTE=compute, LOW=low, HIGH=high,
        OVERLAP=overlap, num_warps=config.warps, enable_fp_fusion=True, **launch_options(overlap),
    )  # fmt: skip
    return out


def unpacking(kind: str, high: bool, dtype: tl.dtype) -> str:
    """PTX that turns four bytes into four 16-bit numbers: bits are placed so that they are the number plus a constant.

    4-bit codes become 128 + code + 8 (1024 in float16), int8 2 ** 23 + 128 + code in float32, e4m3 a number with the
    exponent's bias off, which a power of two repairs; all of it is exact.
    """
    half = dtype == tl.float16
    if kind == "int4":
        take = "shr.b32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F;" if high else "and.b32 t, $2, 0x0F0F0F0F;"
        top = "0x64646464" if half else "0x43434343"
        less = "sub.f16x2 {}, {}, k;" if half else "fma.rn.bf16x2 {}, {}, o, k;"
        return (
            f"{{ .reg .b32 t, a, b, k, o; mov.b32 k, {'0x64086408' if half else '0xC308C308'}; mov.b32 o, 0x3F803F80; "
            f"{take} prmt.b32 a, t, {top}, 0x4140; prmt.b32 b, t, {top}, 0x4342; "
            f"{less.format('$0', 'a')} {less.format('$1', 'b')} }}"
        )
    if kind == "int8":
        names = "abcd"
        places = " ".join(f"prmt.b32 t{x}, t, 0x4B000000, 0x754{n};" for n, x in enumerate(names))
        values = " ".join(f"mov.b32 {x}, t{x}; sub.f32 {x}, {x}, 0f4B000080;" for x in names)
        pair = "cvt.rn.f16x2.f32" if half else "cvt.rn.bf16x2.f32"
        return (
            f"{{ .reg .b32 t, ta, tb, tc, td; .reg .f32 a, b, c, d; xor.b32 t, $2, 0x80808080; {places} {values} "
            f"{pair} $0, b, a; {pair} $1, d, c; }}"
        )
    shift, mask = (1, "0x3F803F80") if half else (4, "0x07F007F0")
    more = "mul.f16x2 {}, s, k;" if half else "fma.rn.bf16x2 {}, s, k, z;"
    steps = " ".join(
        f"prmt.b32 a, $2, 0, {select}; shr.b32 s, a, {shift}; and.b32 s, s, {mask}; and.b32 a, a, 0x80008000; "
        f"or.b32 s, s, a; {more.format(out)}"
        for out, select in (("$0", "0x1404"), ("$1", "0x3424"))
    )
    return (
        f"{{ .reg .b32 a, s, k, z; mov.b32 k, {'0x5C005C00' if half else '0x7B807B80'}; mov.b32 z, 0x80008000; {steps} }}"
    )


@triton.jit
@no_type_check
def _convert(codes, ASM: tl.constexpr, KIND: tl.constexpr, HIGH: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers that bytes mean, exactly; of 4-bit codes those in the low or the high half."""
    if ASM != "":
        if COMPUTE == tl.float16:
            return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif KIND == "int4":
        half = codes >> 4 if HIGH else codes & 15
        return (half.to(tl.int32) - 8).to(COMPUTE)
    elif KIND == "int8":
        return codes.to(tl.int8, bitcast=True).to(tl.float32).to(COMPUTE)
    else:
        wide = codes.to(tl.int32)
        bits = ((wide & 127) << 20) | ((wide & 128) << 24)
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(COMPUTE)  # 2 ** 120


@triton.jit
@no_type_check
def _partial(total, codes, x, x_high, zero, KIND: tl.constexpr, ZERO: tl.constexpr, COMPUTE: tl.constexpr,
             LOW: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """total + the products of a tile's codes, less their zero points, and inputs: [SLICES, BLOCK_N, BLOCK_R]."""
    w = _convert(codes, LOW, KIND, False, COMPUTE)
    if ZERO:
        w -= zero[:, :, None].to(COMPUTE)
    total = tl.dot(w, x, total, input_precision="ieee")
    if KIND == "int4":
        w = _convert(codes, HIGH, KIND, True, COMPUTE)
        if ZERO:
            w -= zero[:, :, None].to(COMPUTE)
        total = tl.dot(w, x_high, total, input_precision="ieee")
    return total


@triton.jit
@no_type_check
def _inputs(x_ptr, norm_ptr, k, r, K: tl.constexpr, OFFSET: tl.constexpr, NORM: tl.constexpr, ONE: tl.constexpr,
            WHOLE_TILES: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Inputs k of all rows, times the norm's weights: [SLICES, BLOCK_B, BLOCK_R]."""
    if ONE:
        if WHOLE_TILES:
            x = tl.load(x_ptr + k)  # [SLICES, BLOCK_B]
        else:
            x = tl.load(x_ptr + k, mask=k < K, other=0)
        if NORM:
            if WHOLE_TILES:
                weight = tl.load(norm_ptr + k)
            else:
                weight = tl.load(norm_ptr + k, mask=k < K, other=0)
            if OFFSET == 0:  # a product of 16-bit numbers is rounded once either way
                x = x * weight
            else:
                x = x.to(tl.float32) * (weight.to(tl.float32) + OFFSET)
        return tl.broadcast_to(x.to(COMPUTE)[:, :, None], [k.shape[0], k.shape[1], BLOCK_R])
    else:
        at = x_ptr + r.to(tl.int64)[None, None, :] * K + k[:, :, None]
        if WHOLE_TILES:
            return tl.load(at).to(COMPUTE)
        else:
            return tl.load(at, mask=(k < K)[:, :, None], other=0).to(COMPUTE)


@triton.jit
@no_type_check
def _norm_factor(x_ptr, eps, K: tl.constexpr):
    """1 / the root of the mean square of one row."""
    BLOCK: tl.constexpr = 1024
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + k, mask=k < K, other=0).to(tl.float32)
        square += x * x
    return 1 / tl.sqrt_rn(tl.sum(square, 0) / K + eps)


@triton.jit
@no_type_check
def _fetch(at, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr):
    """Prefetches the first AHEAD bytes of rows to L2, 128 bytes at a time."""
    a = tl.minimum(tl.arange(0, triton.next_power_of_2((AHEAD + 127) // 128)) * 128, AHEAD - 1)
    where = (at[:, None] + a[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [where], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["N", "rows"])
@no_type_check
def _quantized_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, N, rows, eps,
    K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, SLICES: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_R: tl.constexpr, ONE: tl.constexpr, AHEAD: tl.constexpr, OFFSET: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, COMPUTE: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all rows."""
    EACH: tl.constexpr = 2 if KIND == "int4" else 1
    TILE: tl.constexpr = SLICES * BLOCK_B
    WHOLE_TILES: tl.constexpr = P % TILE == 0 and K == P * EACH
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bounded = tl.minimum(n, N - 1)
    second = bounded + N  # where gated
    r = tl.minimum(tl.arange(0, BLOCK_R), rows - 1)
    part = tl.arange(0, SLICES)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]  # [SLICES, BLOCK_B]
    at = codes_ptr + bounded.to(tl.int64)[None, :, None] * P + part[:, None, :]  # [SLICES, BLOCK_N, BLOCK_B]
    at_2 = codes_ptr + second.to(tl.int64)[None, :, None] * P + part[:, None, :]
    owner = (bounded // SHARED).to(tl.int64) * Q
    owner_2 = (second // SHARED).to(tl.int64) * Q
    if AHEAD:  # weights do not depend on the kernel before
        _fetch(codes_ptr + bounded.to(tl.int64) * P, BLOCK_N, AHEAD)
        if GATE != "":
            _fetch(codes_ptr + second.to(tl.int64) * P, BLOCK_N, AHEAD)
    await_launch(OVERLAP)
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_R], tl.float32)
    acc_2 = acc
    none = acc
    zero = tl.zeros([SLICES, BLOCK_N], tl.int8)
    zero_2 = zero
    if ZERO and WHOLE:
        zero += tl.load(zero_ptr + owner)[None, :]
        if GATE != "":
            zero_2 += tl.load(zero_ptr + owner_2)[None, :]
    for start in tl.range(0, P, TILE, num_stages=STAGES):
        b = start + part
        if WHOLE_TILES:
            codes = tl.load(at + start)
        else:
            codes = tl.load(at + start, mask=(b < P)[:, None, :], other=0)
        k = (b // 16) * 32 + b % 16 if KIND == "int4" else b
        x = _inputs(x_ptr, norm_ptr, k, r, K, OFFSET, NORM, ONE, WHOLE_TILES, COMPUTE, BLOCK_R)
        x_high = x
        if KIND == "int4":
            x_high = _inputs(x_ptr, norm_ptr, k + 16, r, K, OFFSET, NORM, ONE, WHOLE_TILES, COMPUTE, BLOCK_R)
        if WHOLE:
            acc = _partial(acc, codes, x, x_high, zero, KIND, ZERO, COMPUTE, LOW, HIGH)
        else:
            g = tl.minimum((start + tl.arange(0, SLICES) * BLOCK_B) * EACH // GROUP, Q - 1)[:, None]
            if ZERO:
                zero = tl.load(zero_ptr + owner[None, :] + g)
            scale = tl.load(scale_ptr + owner[None, :] + g).to(tl.float32)  # [SLICES, BLOCK_N]
            acc += _partial(none, codes, x, x_high, zero, KIND, ZERO, COMPUTE, LOW, HIGH) * scale[:, :, None]
        if GATE != "":
            if WHOLE_TILES:
                codes = tl.load(at_2 + start)
            else:
                codes = tl.load(at_2 + start, mask=(b < P)[:, None, :], other=0)
            if WHOLE:
                acc_2 = _partial(acc_2, codes, x, x_high, zero_2, KIND, ZERO, COMPUTE, LOW, HIGH)
            else:
                if ZERO:
                    zero_2 = tl.load(zero_ptr + owner_2[None, :] + g)
                scale = tl.load(scale_ptr + owner_2[None, :] + g).to(tl.float32)
                acc_2 += _partial(none, codes, x, x_high, zero_2, KIND, ZERO, COMPUTE, LOW, HIGH) * scale[:, :, None]
    out = tl.sum(acc, 0)  # [BLOCK_N, BLOCK_R]
    out_2 = out
    if GATE != "":
        out_2 = tl.sum(acc_2, 0)
    if WHOLE:
        out *= tl.load(scale_ptr + owner).to(tl.float32)[:, None]
        if GATE != "":
            out_2 *= tl.load(scale_ptr + owner_2).to(tl.float32)[:, None]
    if NORM:
        factor = _norm_factor(x_ptr, eps, K)
        out *= factor
        out_2 *= factor
    if BIAS:
        out += tl.load(bias_ptr + bounded).to(tl.float32)[:, None]
        if GATE != "":
            out_2 += tl.load(bias_ptr + second).to(tl.float32)[:, None]
    if GATE != "":
        out = activate(out, GATE) * out_2
    column = tl.arange(0, BLOCK_R)
    place = column.to(tl.int64)[None, :] * N + n[:, None]
    live = (n < N)[:, None] & (column < rows)[None, :]
    if RESIDUAL:
        out += tl.load(residual_ptr + place, mask=live, other=0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=live)


def expand_triton(weight: QuantizedWeight, dtype: torch.dtype, *, start: int, stop: int) -> Float[Tensor, "N K"]:
    """`ops.weights.expand` by a kernel, for weights that `suits`."""
    if not suits(weight):
        return expand(weight, dtype, start=start, stop=stop)
    inputs, width = weight.inputs, weight.codes.shape[1]
    out = torch.empty((stop - start, inputs), dtype=dtype, device=weight.codes.device)
    overlap = overlaps_launches(out)
    block = 64  # chunks of 16 bytes
    _expand_kernel[(stop - start, triton.cdiv(width, 16 * block))](
        weight.codes.view(torch.uint8), weight.scale, weight.scale if weight.zero is None else weight.zero, out, start,
        K=inputs, P=width, Q=weight.scale.shape[1], GROUP=weight.group, SHARED=weight.rows, KIND=weight.kind,
        ZERO=weight.zero is not None, BLOCK=block, OVERLAP=overlap, num_warps=2, enable_fp_fusion=True,
        **launch_options(overlap),
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _store(out_row, values, k, scale, zero, K: tl.constexpr, ZERO: tl.constexpr):
    if ZERO:
        values -= zero[:, None]
    tl.store(out_row + k, (values * scale[:, None]).to(out_row.dtype.element_ty), mask=k < K)


@triton.jit(do_not_specialize=["start"])
@no_type_check
def _expand_kernel(
    codes_ptr, scale_ptr, zero_ptr, out_ptr, start, K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    GROUP: tl.constexpr, SHARED: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK chunks of 16 bytes of one output."""
    EACH: tl.constexpr = 2 if KIND == "int4" else 1
    row = tl.program_id(0).to(tl.int64)
    n = start + row
    chunk = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = chunk[:, None] * 16 + tl.arange(0, 16)[None, :]  # [BLOCK, 16]
    codes = tl.load(codes_ptr + n * P + b, mask=b < P, other=0)
    place = n // SHARED * Q + tl.minimum(chunk * (16 * EACH) // GROUP, Q - 1)
    scale = tl.load(scale_ptr + place).to(tl.float32)  # [BLOCK]
    zero = scale
    if ZERO:
        zero = tl.load(zero_ptr + place).to(tl.float32)
    await_launch(OVERLAP)  # nothing before this point reads or writes what other kernels write
    k = chunk[:, None] * (16 * EACH) + tl.arange(0, 16)[None, :]
    _store(out_ptr + row * K, _convert(codes, "", KIND, False, tl.float32), k, scale, zero, K, ZERO)
    if KIND == "int4":
        _store(out_ptr + row * K, _convert(codes, "", KIND, True, tl.float32), k + 16, scale, zero, K, ZERO)
