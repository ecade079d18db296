"""Codes of quantized weights as numbers: in registers, and as whole 16-bit matrices."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import await_launch, launch_options, on_device, overlaps_launches
from kvzip.ops.weights import QuantizedWeight, expand


def suits(weight: QuantizedWeight) -> bool:
    """Whether the kernels take a weight: its groups are all inputs, or whole tiles of 16 bytes."""
    each = 32 if weight.kind == "int4" else 16
    return (weight.group == weight.inputs or weight.group % each == 0) and weight.codes.is_contiguous()


def within_group(block_bytes: int, weight: QuantizedWeight) -> int:
    """Bytes of a tile so few that one scale serves all; one scale for all inputs multiplies the sums."""
    unit = weight.group // 2 if weight.kind == "int4" else weight.group
    while weight.group != weight.inputs and unit % block_bytes:
        block_bytes //= 2
    return block_bytes


@on_device
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
    power = "0x5C005C00" if half else "0x7B807B80"
    return f"{{ .reg .b32 a, s, k, z; mov.b32 k, {power}; mov.b32 z, 0x80008000; {steps} }}"


def unpacking_words(kind: str, high: bool, dtype: tl.dtype) -> str:
    """PTX that turns the two bytes of a word into a register of two 16-bit numbers, as `unpacking` does four.

    int8 in bfloat16, which holds 128 to 255: 128 + the lower seven bits, less 128 or, if the sign is set, 256.
    """
    half = dtype == tl.float16
    spread = "{ .reg .b32 t, s, k, o; cvt.u32.u16 t, $1; prmt.b32 t, t, 0, 0x4140;"
    less = "sub.f16x2 $0, t, k; }" if half else "mov.b32 o, 0x3F803F80; fma.rn.bf16x2 $0, t, o, k; }"
    if kind == "int4":
        top, k = ("0x64006400", "0x64086408") if half else ("0x43004300", "0xC308C308")
        return f"{spread} {'shr.b32 t, t, 4;' * high} lop3.b32 t, t, 0x000F000F, {top}, 0xEA; mov.b32 k, {k}; {less}"
    if kind == "int8" and half:
        return f"{spread} xor.b32 t, t, 0x64806480; mov.b32 k, 0x64806480; {less}"
    if kind == "int8":
        return (
            f"{spread} lop3.b32 k, t, 0x00800080, 0xC300C300, 0xEA; lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA; {less}"
        )
    shift, mask = (1, "0x3F803F80") if half else (4, "0x07F007F0")
    more = "mul.f16x2 $0, s, k;" if half else "fma.rn.bf16x2 $0, s, k, o;"
    power = "0x5C005C00" if half else "0x7B807B80"
    return (
        f"{{ .reg .b32 t, s, k, o; mov.b32 k, {power}; mov.b32 o, 0x80008000; cvt.u32.u16 t, $1; "
        f"prmt.b32 t, t, 0, 0x1404; shr.b32 s, t, {shift}; and.b32 t, t, o; lop3.b32 s, s, {mask}, t, 0xEA; {more} }}"
    )


def widening(kind: str) -> str:
    """PTX for Hopper that turns four bytes of 8-bit codes into the four float32 numbers that they mean, exactly."""
    if kind == "int8":  # 2 ** 23 + 128 + code is a float32 whose lowest byte is the code
        places = " ".join(f"prmt.b32 t{n}, t, 0x4B000000, 0x754{n}; mov.b32 ${n}, t{n};" for n in range(4))
        values = " ".join(f"sub.f32 ${n}, ${n}, 0f4B000080;" for n in range(4))
        return f"{{ .reg .b32 t, t0, t1, t2, t3; xor.b32 t, $4, 0x80808080; {places} {values} }}"
    values = " ".join(f"cvt.f32.f16 ${n}, h{n};" for n in range(4))
    return (
        "{ .reg .b16 a, b, h0, h1, h2, h3; .reg .b32 p, q; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 p, a; "
        f"cvt.rn.f16x2.e4m3x2 q, b; mov.b32 {{h0, h1}}, p; mov.b32 {{h2, h3}}, q; {values} }}"
    )


@triton.jit
@no_type_check
def widen(codes, ASM: tl.constexpr, KIND: tl.constexpr):
    """The float32 numbers that 8-bit codes mean."""
    if ASM != "":
        return tl.inline_asm_elementwise(ASM, "=f,=f,=f,=f,r", [codes], dtype=tl.float32, is_pure=True, pack=4)
    else:
        return convert(codes, "", KIND, False, tl.float32)


@triton.jit
@no_type_check
def convert(codes, ASM: tl.constexpr, KIND: tl.constexpr, HIGH: tl.constexpr, COMPUTE: tl.constexpr):
    """The numbers that bytes mean, exactly; of 4-bit codes those in the low or the high half."""
    if ASM != "":
        if tl.float16 == COMPUTE:
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
def convert_words(words, ASM: tl.constexpr, KIND: tl.constexpr, HIGH: tl.constexpr, COMPUTE: tl.constexpr):
    """`convert` of bytes [M, 2 W] that are words [M, W]."""
    if ASM != "":
        pair = tl.inline_asm_elementwise(ASM, "=r,h", [words], dtype=tl.int32, is_pure=True, pack=1)
        first = pair.to(tl.int16).to(COMPUTE, bitcast=True)
        second = (pair >> 16).to(tl.int16).to(COMPUTE, bitcast=True)
    else:
        first = convert((words & 255).to(tl.uint8), "", KIND, HIGH, COMPUTE)
        second = convert(((words >> 8) & 255).to(tl.uint8), "", KIND, HIGH, COMPUTE)
    return tl.reshape(tl.join(first, second), [words.shape[0], 2 * words.shape[1]])


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
    _store(out_ptr + row * K, convert(codes, "", KIND, False, tl.float32), k, scale, zero, K, ZERO)
    if KIND == "int4":
        _store(out_ptr + row * K, convert(codes, "", KIND, True, tl.float32), k + 16, scale, zero, K, ZERO)
