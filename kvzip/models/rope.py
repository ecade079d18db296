"""Rotary position embeddings: inverse frequencies of each kind, cos and sin tables."""

import math

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from .config import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, device: torch.device | str) -> Float32[Tensor, " half"]:
    """Returns the head_dim / 2 inverse frequencies (radians per token).

    Source: RoPE, arXiv 2104.09864; linear, arXiv 2306.15595; llama3, Llama 3.1's rule; YaRN, arXiv 2309.00071.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    base = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    return _yarn(rope, base, head_dim)


def _llama3(rope: RopeSpec, base: Tensor) -> Tensor:
    rotations = rope.original_length * base / (2 * math.pi)  # turns within the original length
    smooth = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * base / rope.factor + smooth * base


def _yarn(rope: RopeSpec, base: Tensor, head_dim: int) -> Tensor:
    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device=base.device) - low) / (high - low)
    ramp = ramp.clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


def cos_sin(
    rope: RopeSpec, positions: Int[Tensor, "... T"], frequencies: Float32[Tensor, " half"], dtype: torch.dtype
) -> tuple[Float[Tensor, "... T D"], Float[Tensor, "... T D"]]:
    """Returns cos and sin of every position, both halves of the head alike, computed in float32 and cast to `dtype`.

    Three kernels where the attention factor is 1, as decoding waits for each.

    Args:
        frequencies: `inverse_frequencies` of `rope`.
    """
    angles = (positions[..., None] * frequencies)[..., None, :].expand(*positions.shape, 2, -1)
    tables = torch.empty((2, *angles.shape), dtype=dtype, device=positions.device)
    for table, function in zip(tables, (torch.cos, torch.sin), strict=True):
        if rope.attention_factor == 1:
            function(angles, out=table)
        else:
            table.copy_(function(angles) * rope.attention_factor)
    cos, sin = tables.flatten(-2).unbind()
    return cos, sin
