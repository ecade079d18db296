"""Scores on the GPU: the rows' log-sum-exp in one launch, the largest weight of each key in another."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import LOG2_E, check_rows, compute_dtype, load_rows, on_device, product, tanh


class Launch(NamedTuple):
    """Sizes of a launch: the tile that a program holds, the tile that it loops over, warps, pipeline stages."""

    stay: int
    walk: int
    warps: int
    stages: int


def launch_config(D: int, dtype: torch.dtype, softcap: bool = False) -> tuple[Launch, Launch]:
    """Launches of the log-sum-exp (holds rows, loops over keys) and of the maximum (holds keys, loops over rows).

    Tuned on an H100, 2026-11-24: docs/tuning.md.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles, which do not spill
        return Launch(16, 16 if D <= 128 else 8, 8, 2), Launch(16, 16, 8, 2)
    if D > 128:  # wide rows: fewer stages fit in shared memory
        return Launch(128, 64, 8, 2), Launch(128, 32, 8, 2)
    return Launch(128, 64, 8, 3), Launch(128, 64, 8 if softcap else 4, 3)  # fastest; with a softcap 4 warps would spill


@on_device
def score_triton(
    q: Float[Tensor, "Hq T D"],
    k: Float[Tensor, "H C D"],
    k_sink: Float[Tensor, "H A D"],
    k_self: Float[Tensor, "H T D"],
    *,
    scale: float,
    softcap: float | None = None,
    lse: Float[Tensor, "Hq T"] | None = None,
    row_weight: Float[Tensor, "Hq T"] | None = None,
    key_weight: Float[Tensor, "Hq C"] | None = None,
    softmax: bool = True,
) -> Float[Tensor, "H C"]:
    """`score` in two launches, or one where the log-sum-exp is given; neither waits on the host.

    2 Hq T D (A + C + T / 2) operations for the log-sum-exp and 2 Hq T D C for the maximum; keys come from L2, and no
    [rows, keys] matrix is stored. exp is monotonic, so it follows the maximum: one a key. Measured: docs/tuning.md.
    """
    query_heads, rows, width = q.shape
    normalizer, largest = launch_config(width, q.dtype, softcap is not None)
    heads, chunk, _ = k.shape
    group = query_heads // heads
    compute = compute_dtype(q)
    check_rows(q=q, k=k, k_sink=k_sink, k_self=k_self)
    best = torch.full((heads, chunk), 0.0 if softmax else -torch.inf, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or chunk == 0:
        return best
    if not softmax:
        best.view(torch.int32).bitwise_xor_(0x7FFFFFFF)  # as the kernel stores negative floats
        lse = best
    elif lse is None:
        lse = torch.empty((query_heads, rows), dtype=torch.float32, device=q.device)
        _normalizer_kernel[(triton.cdiv(rows * group, normalizer.stay), heads)](
            q, k, k_sink, k_self, lse, *q.stride()[:2], *k.stride()[:2], *k_sink.stride()[:2], *k_self.stride()[:2],
            float(scale), float(softcap or 1.0), rows, chunk, k_sink.shape[1],
            G=group, D=width, BLOCK_M=normalizer.stay, BLOCK_N=normalizer.walk, SOFTCAP=softcap is not None,
            COMPUTE=compute, num_warps=normalizer.warps, num_stages=normalizer.stages, enable_fp_fusion=True,
        )  # fmt: skip
    blocks = triton.cdiv(chunk, largest.stay)
    steps = triton.cdiv(rows, largest.walk) * group
    splits = min(steps, max(1, 256 // (blocks * heads)))
    lse = lse.contiguous()
    _largest_kernel[(blocks, heads, splits)](
        q, k, lse, lse if row_weight is None else row_weight.contiguous(),
        lse if key_weight is None else key_weight.contiguous(), best.view(torch.int32),
        *q.stride()[:2], *k.stride()[:2], float(scale), float(softcap or 1.0), rows, chunk, steps,
        G=group, D=width, BLOCK_M=largest.walk, BLOCK_N=largest.stay, SOFTCAP=softcap is not None,
        ROW_WEIGHT=row_weight is not None, KEY_WEIGHT=key_weight is not None, SOFTMAX=softmax,
        COMPUTE=compute, num_warps=largest.warps, num_stages=largest.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if not softmax:
        bits = best.view(torch.int32)
        bits ^= (bits >> 31) & 0x7FFFFFFF
    return best


@triton.jit
@no_type_check
def _logits(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """Products of the rows of a and of b: logits with SOFTCAP, else still to be scaled."""
    x = product(a, b)
    if SOFTCAP:
        x = tanh(x * (scale / softcap)) * softcap
    return x


@triton.jit
@no_type_check
def _fold(
    peak, total, q, k_ptr, stride, at, count, time, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds keys at:at + BLOCK_N to the log-sum-exp; MASKED: only before count, CAUSAL: only up to a row's time."""
    n = tl.arange(0, BLOCK_N)
    here = at + tl.zeros([], tl.int64)
    k = load_rows(k_ptr + here * stride, n, tl.arange(0, BLOCK_D), stride, count - at, MASKED, D, BLOCK_D)
    x = _logits(q, k.to(COMPUTE), scale, softcap, SOFTCAP)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        x = tl.where((n < count - at)[None, :], x, float("-inf"))
    if CAUSAL:
        x = tl.where((at + n)[None, :] <= time[:, None], x, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(x, 1))
    floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    unit = LOG2_E if SOFTCAP else scale * LOG2_E
    total = total * tl.exp2((peak - floor) * unit) + tl.sum(tl.exp2((x - floor[:, None]) * unit), 1)
    return new_peak, total


@triton.jit(do_not_specialize=["rows", "chunk", "prefix"])
@no_type_check
def _normalizer_kernel(
    q_ptr, k_ptr, k_prefix_ptr, k_self_ptr, lse_ptr,
    stride_qh, stride_qt, stride_kh, stride_kc, stride_ah, stride_aa, stride_sh, stride_st,
    scale, softcap, rows, chunk, prefix,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: the log-sum-exp of BLOCK_M rows, a group's heads of one token side by side."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(1).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    time, query_head = m // G, head * G + m % G
    live = m < rows * G
    at_q = q_ptr + query_head * stride_qh + time.to(tl.int64) * stride_qt
    q = tl.load(at_q[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0).to(COMPUTE)
    factor = 1.0 if SOFTCAP else scale
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(2):
        base = k_prefix_ptr + head * stride_ah if part == 0 else k_ptr + head * stride_kh
        stride = stride_aa if part == 0 else stride_kc
        count = prefix if part == 0 else chunk
        full = count // BLOCK_N * BLOCK_N
        for at in range(0, full, BLOCK_N):
            peak, total = _fold(peak, total, q, base, stride, at, count, time, scale, softcap,
                                D, BLOCK_D, BLOCK_N, SOFTCAP, False, False, COMPUTE)  # fmt: skip
        if full < count:
            peak, total = _fold(peak, total, q, base, stride, full, count, time, scale, softcap,
                                D, BLOCK_D, BLOCK_N, SOFTCAP, True, False, COMPUTE)  # fmt: skip
    base = k_self_ptr + head * stride_sh
    seen = tl.minimum((first + BLOCK_M - 1) // G + 1, rows)
    full = (first // G + 1) // BLOCK_N * BLOCK_N  # every row sees keys before this
    for at in range(0, full, BLOCK_N):
        peak, total = _fold(peak, total, q, base, stride_st, at, rows, time, scale, softcap,
                            D, BLOCK_D, BLOCK_N, SOFTCAP, False, False, COMPUTE)  # fmt: skip
    for at in range(full, seen, BLOCK_N):
        peak, total = _fold(peak, total, q, base, stride_st, at, rows, time, scale, softcap,
                            D, BLOCK_D, BLOCK_N, SOFTCAP, True, True, COMPUTE)  # fmt: skip
    tl.store(lse_ptr + query_head * rows + time, peak * factor + tl.log(total), mask=live)


@triton.jit(do_not_specialize=["rows", "chunk", "steps"])
@no_type_check
def _largest_kernel(
    q_ptr, k_ptr, lse_ptr, row_weight_ptr, key_weight_ptr, best_bits_ptr,
    stride_qh, stride_qt, stride_kh, stride_kc, scale, softcap, rows, chunk, steps,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
    ROW_WEIGHT: tl.constexpr, KEY_WEIGHT: tl.constexpr, SOFTMAX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: the largest weight that a share of the rows gives to each of BLOCK_N keys.

    The exponential is taken once per key, after the maximum of the exponents (weights enter as logarithms). Without
    SOFTMAX the maximum is that of the logits.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at_k = k_ptr + head * stride_kh + n.to(tl.int64)[:, None] * stride_kc + d[None, :]
    k = tl.load(at_k, mask=(n < chunk)[:, None] & (d < D)[None, :], other=0).to(COMPUTE)
    factor = 1.0 if SOFTCAP else scale
    best = tl.full([BLOCK_N, BLOCK_M], float("-inf"), tl.float32)
    each = steps // G
    share = tl.cdiv(steps, tl.num_programs(2))
    begin = tl.program_id(2) * share
    for step in range(begin, tl.minimum(begin + share, steps), 1):
        query_head = head * G + step // each
        first = step % each * BLOCK_M
        live = m < rows - first
        at_q = q_ptr + query_head * stride_qh + (first + tl.zeros([], tl.int64)) * stride_qt
        q = load_rows(at_q, m, d, stride_qt, rows - first, True, D, BLOCK_D)
        place = query_head * rows + first + m
        if SOFTMAX:
            base = tl.load(lse_ptr + place, mask=live, other=float("inf")).to(tl.float32)
            base = tl.where(live & (base == float("inf")), float("nan"), base)
        else:
            base = tl.where(live, 0.0, float("inf"))
        if ROW_WEIGHT:
            base -= tl.log(tl.load(row_weight_ptr + place, mask=live, other=0).to(tl.float32))
        x = _logits(k, q.to(COMPUTE), scale, softcap, SOFTCAP) * factor - base[None, :]  # [BLOCK_N, BLOCK_M]
        if KEY_WEIGHT:
            weight = tl.load(key_weight_ptr + query_head * chunk + n, mask=n < chunk, other=0).to(tl.float32)
            x += tl.log(weight)[:, None]
        best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.max(best, 1)
    if SOFTMAX:
        weight = tl.exp2(weight * LOG2_E)
    # atomic_max needs bits that sort as the floats do: those of non-negative floats do, NaN highest; of negative ones
    # all bits but the sign are flipped.
    broken = tl.max((best != best).to(tl.int32), 1) > 0
    bits = tl.where(broken, 0x7FC00000, weight.to(tl.int32, bitcast=True))
    if not SOFTMAX:
        bits ^= (bits >> 31) & 0x7FFFFFFF
    tl.atomic_max(best_bits_ptr + head * chunk + n, bits, mask=n < chunk, sem="relaxed")
