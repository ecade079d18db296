"""One row times weights in 4 bits, without tensor cores.

A thread has 16 bytes of a row of codes at a time, 32 inputs of one group: it adds up their products in float32, and the
group's scale multiplies the sum. A code becomes a float32 by one permutation of bytes: 128 + (code + 8) has it in its
mantissa. What is too much is taken off the sum, as the zero point is, times the sum of the inputs.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import activate, await_launch, interpreted, launch_options, on_device, overlaps_launches
from kvzip.ops.types import Norm
from kvzip.ops.weights import QuantizedWeight


class Launch(NamedTuple):
    """Sizes of one launch: outputs and 16-byte chunks of a tile, warps, tiles in flight, bytes of a row prefetched."""

    block_n: int
    chunks: int
    warps: int
    stages: int
    ahead: int


LAUNCHES = (
    Launch(4, 64, 2, 3, 1024),
    Launch(8, 64, 2, 3, 1024),
    Launch(8, 64, 2, 2, 1024),
    Launch(8, 64, 2, 4, 2048),
    Launch(16, 64, 2, 3, 1024),
    Launch(8, 128, 4, 2, 1024),
    Launch(16, 128, 4, 2, 1024),
    Launch(8, 64, 4, 3, 1024),
    Launch(16, 64, 4, 3, 1024),
    Launch(8, 32, 1, 3, 1024),
    Launch(4, 32, 1, 4, 1024),
    Launch(8, 32, 2, 4, 1024),
)
"""What `benchmarks/ops.py --only linear --launches` times for one row of 4-bit codes."""


def launch_config(N: int, K: int) -> Launch:
    """The launch for N outputs and K inputs."""
    return Launch(8, 64, 2, 3, 1024) if K >= 8192 or N >= 8192 else Launch(4, 64, 2, 3, 1024)


@on_device
def row_of_4_bits(
    x: Float[Tensor, "*b K"],
    weight: QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
    config: Launch | None = None,
) -> Float[Tensor, "*b M"]:
    """`linear` of one row with 4-bit codes that `suits` takes, as one launch that reads every code once."""
    N, K = weight.shape
    config = config or launch_config(N, K)
    N = N if gate is None else N // 2
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    overlap, wide = overlaps_launches(x), weight.codes.shape[1]
    _row4_kernel[(triton.cdiv(N, config.block_n),)](
        x, weight.codes.view(torch.int32), weight.scale, weight.scale if weight.zero is None else weight.zero,
        x if bias is None else bias, x if norm is None else norm.weight,
        x if residual is None else residual.contiguous(), out, N, 0.0 if norm is None else float(norm.eps),
        K=K, CHUNKS=wide // 16, Q=weight.scale.shape[1], UNIT=triton.cdiv(weight.group, 32), SHARED=weight.rows,
        ZERO=weight.zero is not None, BLOCK_N=config.block_n,
        BLOCK_C=min(config.chunks, triton.next_power_of_2(wide // 16)), STAGES=config.stages,
        AHEAD=min(config.ahead, wide) if overlap else 0, OFFSET=0 if norm is None else norm.offset,
        NORM=norm is not None, GATE=gate or "", BIAS=bias is not None, RESIDUAL=residual is not None,
        ASM="" if interpreted() else _DOT, OVERLAP=overlap, num_warps=config.warps, enable_fp_fusion=True,
        **launch_options(overlap),
    )  # fmt: skip
    return out


def _dot() -> str:
    """PTX: $0 = the sum of eight inputs ($2 to $9) times 136 + the codes in a word ($1), low halves of bytes first."""
    places = [f"prmt.b32 u, t, 0x43000000, 0x7{n}44; mov.b32 f, u;" for n in range(4)]
    low = [f"{place} fma.rn.f32 s, f, ${n + 2}, s;" for n, place in enumerate(places)]
    high = [f"{place} fma.rn.f32 s, f, ${n + 6}, s;" for n, place in enumerate(places)]
    low[0] = f"{places[0]} mul.rn.f32 s, f, $2;"
    steps = ["and.b32 t, $1, 0x0F0F0F0F;", *low, "shr.b32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F;", *high]
    return f"{{ .reg .b32 t, u; .reg .f32 f, s; {' '.join(steps)} mov.f32 $0, s; }}"


_DOT = _dot()


@triton.jit
@no_type_check
def _number(words, PLACE: tl.constexpr):
    """136 + the code at a place of words; without the permutation of bytes."""
    return (((words >> PLACE) & 15) << 16 | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _products(words, low, high, ASM: tl.constexpr):
    """Of each word [BLOCK_N, BLOCK_C, 4] the sum of its eight products with inputs, four of [1, BLOCK_C, 4] each."""
    a, b, c, d = low
    e, f, g, h = high
    if ASM != "":
        return tl.inline_asm_elementwise(
            ASM, "=f,r,f,f,f,f,f,f,f,f",
            [words, a, b, c, d, e, f, g, h],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total = _number(words, 0) * a + _number(words, 8) * b
        total += _number(words, 16) * c + _number(words, 24) * d
        total += _number(words, 4) * e + _number(words, 12) * f
        return total + _number(words, 20) * g + _number(words, 28) * h


@triton.jit
@no_type_check
def _inputs(x_ptr, norm_ptr, k, K: tl.constexpr, WHOLE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr):
    """Inputs k [BLOCK_C, 32], times the norm's weights, as `_products` takes them; their sums, and their squares'."""
    if WHOLE:
        x = tl.load(x_ptr + k).to(tl.float32)
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0).to(tl.float32)
    square = tl.sum(x * x, 1)
    if NORM:
        if WHOLE:
            x *= tl.load(norm_ptr + k).to(tl.float32) + OFFSET
        else:
            x *= tl.load(norm_ptr + k, mask=k < K, other=0).to(tl.float32) + OFFSET
    low, high = tl.split(tl.permute(tl.reshape(x, [k.shape[0], 2, 16]), [0, 2, 1]))
    return _fours(low), _fours(high), tl.sum(x, 1), square


@triton.jit
@no_type_check
def _fours(x):
    """Every fourth of [BLOCK_C, 16], from the first, the second and so on: four of [1, BLOCK_C, 4]."""
    even, odd = tl.split(tl.reshape(x, [1, x.shape[0], 4, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
@no_type_check
def _steps(ptr, owner, chunk, Q: tl.constexpr, UNIT: tl.constexpr):
    """Scales or zero points of outputs and chunks: [BLOCK_N, BLOCK_C]."""
    return tl.load(ptr + owner[:, None] + tl.minimum(chunk // UNIT, Q - 1)[None, :])


@triton.jit
@no_type_check
def _tile(at, start, chunk, CHUNKS: tl.constexpr, WHOLE: tl.constexpr):
    """Words of the chunks from `start` on: [BLOCK_N, BLOCK_C, 4]."""
    if WHOLE:
        return tl.load(at + start * 4)
    else:
        return tl.load(at + start * 4, mask=(start + chunk < CHUNKS)[None, :, None], other=0)


@triton.jit
@no_type_check
def _fetch(at, AHEAD: tl.constexpr):
    """Prefetches the first AHEAD bytes of rows to L2, 128 bytes at a time."""
    a = tl.minimum(tl.arange(0, triton.next_power_of_2((AHEAD + 127) // 128)) * 32, AHEAD // 4 - 1)
    where = (at[:, None] + a[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [where], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _row4_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, N, eps,
    K: tl.constexpr, CHUNKS: tl.constexpr, Q: tl.constexpr, UNIT: tl.constexpr, SHARED: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    OFFSET: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ASM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of one row."""
    WHOLE: tl.constexpr = CHUNKS % BLOCK_C == 0 and K == CHUNKS * 32
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    second = n + N  # where gated
    row, row_2 = (codes_ptr + n.to(tl.int64) * (CHUNKS * 4), codes_ptr + second.to(tl.int64) * (CHUNKS * 4))
    if AHEAD:  # weights do not depend on the kernel before
        _fetch(row, AHEAD)
        if GATE != "":
            _fetch(row_2, AHEAD)
    chunk, four = tl.arange(0, BLOCK_C), tl.arange(0, 4)
    word = chunk[:, None] * 4 + four[None, :]
    at, at_2 = row[:, None, None] + word, row_2[:, None, None] + word
    owner, owner_2 = (n // SHARED).to(tl.int64) * Q, (second // SHARED).to(tl.int64) * Q
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    acc_2 = acc
    square = tl.zeros([BLOCK_C], tl.float32)
    scale, zero = _steps(scale_ptr, owner, chunk, Q, UNIT), acc  # of a tile: loaded while the one before is added up
    scale_2, zero_2 = scale, acc
    if ZERO:
        zero = _steps(zero_ptr, owner, chunk, Q, UNIT).to(tl.float32)
    if GATE != "":
        scale_2 = _steps(scale_ptr, owner_2, chunk, Q, UNIT)
        if ZERO:
            zero_2 = _steps(zero_ptr, owner_2, chunk, Q, UNIT).to(tl.float32)
    await_launch(OVERLAP)
    for start in tl.range(0, CHUNKS, BLOCK_C, num_stages=STAGES):
        later = start + BLOCK_C + chunk
        next_scale = _steps(scale_ptr, owner, later, Q, UNIT)
        next_scale_2 = next_scale
        next_zero = zero
        next_zero_2 = zero_2
        if ZERO:
            next_zero = _steps(zero_ptr, owner, later, Q, UNIT).to(tl.float32)
        if GATE != "":
            next_scale_2 = _steps(scale_ptr, owner_2, later, Q, UNIT)
            if ZERO:
                next_zero_2 = _steps(zero_ptr, owner_2, later, Q, UNIT).to(tl.float32)
        words = _tile(at, start, chunk, CHUNKS, WHOLE)
        k = (start + chunk)[:, None] * 32 + tl.arange(0, 32)[None, :]
        low, high, sums, more = _inputs(x_ptr, norm_ptr, k, K, WHOLE, NORM, OFFSET)
        square += more
        part = tl.sum(_products(words, low, high, ASM), 2) - (zero + 136) * sums[None, :]
        acc += part * scale.to(tl.float32)
        if GATE != "":
            words = _tile(at_2, start, chunk, CHUNKS, WHOLE)
            part = tl.sum(_products(words, low, high, ASM), 2) - (zero_2 + 136) * sums[None, :]
            acc_2 += part * scale_2.to(tl.float32)
        scale, scale_2, zero, zero_2 = next_scale, next_scale_2, next_zero, next_zero_2
    out = tl.sum(acc, 1)
    out_2 = out
    if GATE != "":
        out_2 = tl.sum(acc_2, 1)
    if NORM:
        factor = 1 / tl.sqrt_rn(tl.sum(square, 0) / K + eps)
        out *= factor
        out_2 *= factor
    if BIAS:
        out += tl.load(bias_ptr + n).to(tl.float32)
        if GATE != "":
            out_2 += tl.load(bias_ptr + second).to(tl.float32)
    if GATE != "":
        out = activate(out, GATE) * out_2
    if RESIDUAL:
        out += tl.load(residual_ptr + n).to(tl.float32)
    live = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N) < N
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=live)
