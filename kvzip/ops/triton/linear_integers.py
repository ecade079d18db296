"""One row times weights of 4 bits: x becomes integers too, and four products are one instruction.

A chunk is 16 bytes of an output's codes, for 32 inputs, which one thread reads. The inputs of a chunk, times the norm's
weights, become integers of 16 bits times a power of two of the chunk's own: bfloat16 numbers of at least 2 ** -7 of the
largest stay what they are, and no other moves by more than 2 ** -15 of it. An integer is a high and a low byte; their
products with codes (dp4a) and the sums over a chunk are exact.
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
    interpreted,
    launch_options,
    on_device,
    overlaps_launches,
    prefetch_starts,
)
from kvzip.ops.triton.rotary import NO_ROTATION, Rotation, load_angles, store_rotated
from kvzip.ops.types import Norm
from kvzip.ops.weights import BLOCK, QuantizedWeight

_MOST = 2048  # chunks of an output


class Launch(NamedTuple):
    """Sizes of one launch: outputs of a program, chunks of a thread, and what is read before the wait."""

    block_n: int
    each: int
    ahead: int  # bytes of each row, to L2
    early: bool = False  # whether all codes are loaded


LAUNCHES = (
    Launch(8, 16, 4096),
    Launch(8, 16, 1024),
    Launch(16, 16, 0, early=True),
    Launch(8, 16, 4096, early=True),
    Launch(4, 16, 1024),
    Launch(8, 32, 1024),
    Launch(16, 32, 1024),
)
"""What `benchmarks/ops.py --only linear --launches` times for one row of 4-bit codes."""


def launch_config(outputs: int, inputs: int) -> Launch:
    """The launch for N outputs and K inputs. Tuned on an H100, 2026-11-28: docs/tuning.md."""
    if inputs > 8192:
        return Launch(8, 16, 4096)
    if outputs > 8192:
        return Launch(8, 16, 1024)
    return Launch(16, 16, 0, early=True) if outputs > 4096 else Launch(8, 16, 4096, early=True)


def has_integers(weight: QuantizedWeight, x: Tensor, norm: Norm | None = None) -> bool:
    """Whether `integer_row` takes them: 4 bits, whole chunks, each within a group, 16-bit x and norm of one dtype."""
    whole = weight.group == weight.inputs or weight.group % BLOCK == 0
    fits = weight.kind == "int4" and weight.inputs % BLOCK == 0 and weight.inputs <= BLOCK * _MOST
    same = norm is None or norm.weight.dtype == x.dtype
    return fits and whole and same and weight.codes.is_contiguous() and x.dtype != torch.float32


@on_device
def integer_row(
    x: Float[Tensor, "*b K"],
    weight: QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
    rotation: Rotation = NO_ROTATION,
    config: Launch | None = None,
) -> Float[Tensor, "*b M"]:
    """`linear` of one row, with a weight that `has_integers`, as one launch that reads every code once.

    Heads are rotated with `rotation`.
    """
    outputs, inputs = weight.shape
    config = config or launch_config(outputs, inputs)
    out = torch.empty((*x.shape[:-1], outputs if gate is None else outputs // 2), dtype=x.dtype, device=x.device)
    pairs = gate is not None or rotation.half > 0
    block_n = rotation.pairs(config.block_n) if rotation.half else config.block_n
    N = outputs // 2 if pairs else outputs
    overlap, words = overlaps_launches(x), weight.codes.shape[1] // 4
    chunks = triton.next_power_of_2(words // 4)
    threads = chunks * block_n * (2 if pairs else 1) // config.each
    _integer_kernel[(triton.cdiv(N, block_n),)](
        _words(x), weight.codes.view(torch.int32), weight.scale, weight.scale if weight.zero is None else weight.zero,
        x if bias is None else bias, x if norm is None else _words(norm.weight),
        x if residual is None else residual.contiguous(), out, rotation.args,
        N, rotation.capacity, 0.0 if norm is None else float(norm.eps),
        K=inputs, W=words, Q=weight.scale.shape[1], GROUP=weight.group, SHARED=weight.rows,
        ZERO=weight.zero is not None, BLOCK_N=block_n, C=chunks, EVEN=N % block_n == 0,
        AHEAD=min(config.ahead // 4, words) if overlap else 0, EARLY=config.early,
        OFFSET=0 if norm is None else norm.offset, NORM=norm is not None, GATE=gate or "", BIAS=bias is not None,
        RESIDUAL=residual is not None, HALF=rotation.half, HEADS=rotation.heads, KV_HEADS=rotation.kv_heads,
        TAIL=rotation.tail, FLOAT16=x.dtype == torch.float16, ASM=not interpreted(), OVERLAP=overlap,
        num_warps=min(max(threads // 32, 1), 16), enable_fp_fusion=True, **launch_options(overlap),
    )  # fmt: skip
    return out


def _words(x: Tensor) -> Tensor:
    """A row of 16-bit numbers as 32-bit words of two, which begin where vectors may."""
    x = x.contiguous().view(-1)
    return (x if x.data_ptr() % 16 == 0 else x.clone()).view(torch.int32)


@triton.jit
@no_type_check
def _permute(a, b, SELECT: tl.constexpr, ASM: tl.constexpr):
    """Four bytes of two words as one, those at four places of eight: SELECT names the last one first, as 0x7531."""
    if ASM:
        asm: tl.constexpr = "prmt.b32 $0, $1, $2, " + SELECT + ";"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    elif SELECT == "0x5410":
        return (a & 0xFFFF) | (b << 16)
    else:
        shift: tl.constexpr = 8 if SELECT == "0x7531" else 0
        a, b = a >> shift, b >> shift
        return (a & 255) | ((a >> 8) & 0xFF00) | ((b & 255) << 16) | ((b & 0xFF0000) << 8)


@triton.jit
@no_type_check
def _dot(a, b, total, SIGNS: tl.constexpr, ASM: tl.constexpr):
    """total + the sum of products of four bytes each, those of a without and of b perhaps with a sign: SIGNS."""
    if ASM:
        asm: tl.constexpr = "dp4a." + SIGNS + " $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1)
    else:
        bias: tl.constexpr = 128 if SIGNS == "u32.s32" else 0
        for place in tl.static_range(0, 32, 8):
            total += ((a >> place) & 255) * ((((b >> place) & 255) ^ bias) - bias)
        return total


@triton.jit
@no_type_check
def _load(at, ASM: tl.constexpr):
    """The bits of scales or zero points, in the layout in which they are used, where Triton would choose another."""
    if ASM:
        size: tl.constexpr = at.dtype.element_ty.primitive_bitwidth
        kind: tl.constexpr = "s8" if size == 8 else ("u16" if size == 16 else "b32")
        asm: tl.constexpr = "ld.global.nc." + kind + " $0, [$1];"
        return tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.load(at)


@triton.jit
@no_type_check
def _number(bits, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """What `_load` loaded from memory of a dtype, as float32."""
    if not ASM:
        return bits.to(tl.float32)
    elif tl.float32 == DTYPE:
        return bits.to(tl.float32, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
@no_type_check
def _quarters(words):
    """Words of chunks [M, 4 C], as the first, second, third and last of each: four [M, C]."""
    C: tl.constexpr = words.shape[1] // 4
    even, odd = tl.split(tl.reshape(words, [words.shape[0], C, 2, 2]))
    first, third = tl.split(even)
    second, last = tl.split(odd)
    return first, second, third, last


@triton.jit
@no_type_check
def _pair(word, FLOAT16: tl.constexpr):
    """The two 16-bit numbers of a word, as float32."""
    if FLOAT16:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, high
    else:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _eight(ptr, at, live, FLOAT16: tl.constexpr, WHOLE: tl.constexpr):
    """Eight numbers of each chunk, from four words: [1, C] each."""
    if WHOLE:
        words = tl.load(ptr + at)
    else:
        words = tl.load(ptr + at, mask=live, other=0)
    a, b, c, d = _quarters(words)
    a0, a1 = _pair(a, FLOAT16)
    b0, b1 = _pair(b, FLOAT16)
    c0, c1 = _pair(c, FLOAT16)
    d0, d1 = _pair(d, FLOAT16)
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
@no_type_check
def _inputs(x_ptr, norm_ptr, at, live, square, FLOAT16: tl.constexpr, WHOLE: tl.constexpr, NORM: tl.constexpr,
            OFFSET: tl.constexpr):  # fmt: skip
    """Eight inputs of each chunk, times the norm's weights; and square + the sum of their squares."""
    x = _eight(x_ptr, at, live, FLOAT16, WHOLE)
    if NORM:
        for i in tl.static_range(8):
            square += x[i] * x[i]
        w = _eight(norm_ptr, at, live, FLOAT16, WHOLE)
        x = (
            x[0] * (w[0] + OFFSET), x[1] * (w[1] + OFFSET), x[2] * (w[2] + OFFSET), x[3] * (w[3] + OFFSET),
            x[4] * (w[4] + OFFSET), x[5] * (w[5] + OFFSET), x[6] * (w[6] + OFFSET), x[7] * (w[7] + OFFSET),
        )  # fmt: skip
    return x, square


@triton.jit
@no_type_check
def _largest(x, most):
    """The largest magnitude of eight inputs and `most`; NaN stays."""
    for i in tl.static_range(8):
        most = tl.maximum(most, tl.abs(x[i]), propagate_nan=tl.PropagateNan.ALL)
    return most


@triton.jit
@no_type_check
def _integer(x, factor):
    """Bits whose lower half is the integer nearest to x * factor, of 16 bits: 1.5 * 2 ** 23 is added."""
    return (x * factor + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def _bytes(x, factor, ASM: tl.constexpr):
    """Integers of eight inputs: high and low bytes of the first four, then of the others."""
    a = _permute(_integer(x[0], factor), _integer(x[1], factor), "0x5410", ASM)
    b = _permute(_integer(x[2], factor), _integer(x[3], factor), "0x5410", ASM)
    c = _permute(_integer(x[4], factor), _integer(x[5], factor), "0x5410", ASM)
    d = _permute(_integer(x[6], factor), _integer(x[7], factor), "0x5410", ASM)
    return (
        _permute(a, b, "0x7531", ASM), _permute(a, b, "0x6420", ASM),
        _permute(c, d, "0x7531", ASM), _permute(c, d, "0x6420", ASM),
    )  # fmt: skip


@triton.jit
@no_type_check
def _products(a, b, x, high, low, HALF_BYTES: tl.constexpr, ASM: tl.constexpr):
    """Adds products of two words' codes, in one half of each byte, with high and with low bytes of eight inputs."""
    a, b = a & HALF_BYTES, b & HALF_BYTES
    high, low = _dot(a, x[0], high, "u32.s32", ASM), _dot(a, x[1], low, "u32.u32", ASM)
    return _dot(b, x[2], high, "u32.s32", ASM), _dot(b, x[3], low, "u32.u32", ASM)


@triton.jit
@no_type_check
def _sums(words, x, base, ASM: tl.constexpr):
    """16 * (base + codes times integers), of each chunk: [BLOCK_N, C]. Upper codes are read as 16 times themselves."""
    a, b, c, d = _quarters(words)
    none = a * 0
    high, low = _products(a, b, x[0], none, base, 0x0F0F0F0F, ASM)
    high, low = _products(c, d, x[1], high, low, 0x0F0F0F0F, ASM)
    upper_high, upper_low = _products(a, b, x[2], none, none, -0x0F0F0F10, ASM)
    upper_high, upper_low = _products(c, d, x[3], upper_high, upper_low, -0x0F0F0F10, ASM)
    return ((high * 16 + upper_high) * 256 + low * 16 + upper_low).to(tl.float32)


@triton.jit
@no_type_check
def _scales(ptr, owner, g, Q: tl.constexpr, ASM: tl.constexpr):
    """Bits of the scales of some outputs: of each chunk [BLOCK_N, C], or of all inputs [BLOCK_N, 1]."""
    if Q == 1:
        return _load(ptr + owner[:, None], ASM)
    else:
        return _load(ptr + owner[:, None] + g[None, :], ASM)


@triton.jit
@no_type_check
def _outputs(words, x, base, step, scale, SCALES: tl.constexpr, ASM: tl.constexpr):
    """What chunks add up to, with their steps and scales: [BLOCK_N]."""
    return tl.sum(_sums(words, x, base, ASM) * step * _number(scale, SCALES, ASM), 1)


@triton.jit
@no_type_check
def _total(x, high, low, ASM: tl.constexpr):
    """Adds the high and low bytes of eight inputs."""
    ones = x[0] * 0 + 0x01010101
    high, low = _dot(ones, x[0], high, "u32.s32", ASM), _dot(ones, x[1], low, "u32.u32", ASM)
    return _dot(ones, x[2], high, "u32.s32", ASM), _dot(ones, x[3], low, "u32.u32", ASM)


@triton.jit
@no_type_check
def _codes(at, j, W: tl.constexpr):
    """The words of some outputs' codes: [BLOCK_N, 4 C]."""
    if j.shape[0] == W:
        return tl.load(at[:, None] + j[None, :])
    else:
        return tl.load(at[:, None] + j[None, :], mask=(j < W)[None, :], other=0)


@triton.jit(do_not_specialize=["N", "capacity"])
@no_type_check
def _integer_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, rotation, N, capacity, eps,
    K: tl.constexpr, W: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_N: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    EARLY: tl.constexpr, OFFSET: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TAIL: tl.constexpr,
    FLOAT16: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs, or pairs of them (halves of the gate, or of heads); all inputs at once."""
    SCALES: tl.constexpr = scale_ptr.dtype.element_ty
    PAIRS: tl.constexpr = GATE != "" or HALF > 0
    first = tl.program_id(0) * BLOCK_N
    apart = N  # a pair's outputs
    if HALF:
        first += first // HALF * HALF
        apart = N * 0 + HALF
    each = tl.arange(0, BLOCK_N)
    if not EVEN:
        each = tl.minimum(first + each, N - 1) - first
    j = tl.arange(0, 4 * C)
    g = tl.minimum(tl.arange(0, C) * 32 // GROUP, Q - 1)
    at = codes_ptr + first.to(tl.int64) * W + each * W
    at_2 = codes_ptr + (first + apart).to(tl.int64) * W + each * W  # of pairs
    if SHARED == 1:
        owner = first.to(tl.int64) * Q + each * Q
        owner_2 = (first + apart).to(tl.int64) * Q + each * Q
    else:
        owner = ((first + each) // SHARED).to(tl.int64) * Q
        owner_2 = ((first + apart + each) // SHARED).to(tl.int64) * Q
    if AHEAD:  # weights do not depend on the kernel before
        prefetch_starts(at, AHEAD)
        if PAIRS:
            prefetch_starts(at_2, AHEAD)
    if OVERLAP:
        prefetch_starts(scale_ptr + owner, Q)
        if PAIRS:
            prefetch_starts(scale_ptr + owner_2, Q)
    if EARLY:
        words = _codes(at, j, W)
        if PAIRS:
            words_2 = _codes(at_2, j, W)
    await_launch(OVERLAP)
    if HALF:
        angles = load_angles(rotation, first + each, HALF, TAIL)
    if not EARLY:
        words = _codes(at, j, W)
        if PAIRS:
            words_2 = _codes(at_2, j, W)
    scale = _scales(scale_ptr, owner, g, Q, ASM)
    if PAIRS:
        scale_2 = _scales(scale_ptr, owner_2, g, Q, ASM)
    k = ((j // 4) * 16 + j % 4)[None, :]  # words of the inputs
    live = (j < W)[None, :]
    square = tl.zeros([1, C], tl.float32)
    WHOLE: tl.constexpr = W == 4 * C
    v0, square = _inputs(x_ptr, norm_ptr, k, live, square, FLOAT16, WHOLE, NORM, OFFSET)
    v1, square = _inputs(x_ptr, norm_ptr, k + 4, live, square, FLOAT16, WHOLE, NORM, OFFSET)
    v2, square = _inputs(x_ptr, norm_ptr, k + 8, live, square, FLOAT16, WHOLE, NORM, OFFSET)
    v3, square = _inputs(x_ptr, norm_ptr, k + 12, live, square, FLOAT16, WHOLE, NORM, OFFSET)
    most = _largest(v3, _largest(v2, _largest(v1, _largest(v0, tl.zeros([1, C], tl.float32)))))
    # A power of two, so that the largest becomes 2 ** 14 or more and rounds to less than 2 ** 15.
    top = (tl.maximum(most, 2.0e-34).to(tl.int32, bitcast=True) + 512) & 0x7F800000
    factor = (-2046820352 - top).to(tl.float32, bitcast=True)  # 2 ** 14 / it: its exponent is 268 less the other's
    step = (top - (18 << 23)).to(tl.float32, bitcast=True) + most * 0  # of 16 times a sum; NaN for what is not finite
    x = (_bytes(v0, factor, ASM), _bytes(v1, factor, ASM), _bytes(v2, factor, ASM), _bytes(v3, factor, ASM))
    high = x[0][0] * 0
    low = high
    for i in tl.static_range(4):
        high, low = _total(x[i], high, low, ASM)
    total = high * 256 + low
    base = total * -8  # codes are stored plus 8
    base_2 = base
    if ZERO:
        base -= _load(zero_ptr + owner[:, None] + g[None, :], ASM).to(tl.int32) * total
        if PAIRS:
            base_2 -= _load(zero_ptr + owner_2[:, None] + g[None, :], ASM).to(tl.int32) * total
    norm = 1.0
    if NORM:
        norm = 1 / tl.sqrt_rn(tl.sum(square) / K + eps)
    out = _outputs(words, x, base, step, scale, SCALES, ASM) * norm
    if BIAS:
        out += tl.load(bias_ptr + first + each).to(tl.float32)
    if PAIRS:
        out_2 = _outputs(words_2, x, base_2, step, scale_2, SCALES, ASM) * norm
        if BIAS:
            out_2 += tl.load(bias_ptr + first + apart + each).to(tl.float32)
        if GATE != "":
            out = activate(out, GATE) * out_2
    n = first + tl.arange(0, BLOCK_N)
    if RESIDUAL:
        out += tl.load(residual_ptr + n, mask=n < N, other=0).to(tl.float32)
    if HALF:
        store_rotated(out, out_2, n, angles, out_ptr, rotation, capacity, HALF, HEADS, KV_HEADS, TAIL)
    else:
        tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < N)
