"""Queries, keys and values of new tokens: split from one product, normalized per head in some models, and rotated."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.norm import rms_norm_reference


def rotary(
    qkv: Float[Tensor, "B T W"],
    cos: Float[Tensor, "*b T D"],
    sin: Float[Tensor, "*b T D"],
    *,
    kv_heads: int,
    q_norm: Float[Tensor, " D"] | None = None,
    k_norm: Float[Tensor, " D"] | None = None,
    eps: float = 0.0,
    offset: int = 0,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
    """Returns q and k, rotated by position, and v, out of W = (Hq + 2 H) D values a token.

    The pair (x[i], x[i + D/2]) of a head turns by its angle: x * cos + [-x[D/2:], x[:D/2]] * sin.
    v is a view of qkv.

    Args:
        cos, sin: [T D] for all questions or [B T D]; both halves of D are alike.
        kv_heads: H; what is left of W are the query heads.
        q_norm, k_norm: weights of an RMSNorm of each head before the rotation (`eps` and `offset` as in `rms_norm`);
            both or none.

    Raises: ValueError if shapes do not fit together.
    Source: RoPE, arXiv 2104.09864.
    """
    check_rotary(qkv.shape, cos, sin, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm)
    if use_triton(qkv):
        from kvzip.ops.triton.rotary import rotary_triton as run
    else:
        run = rotary_reference
    return run(qkv, cos, sin, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, offset=offset)


def check_rotary(
    shape: Sequence[int], cos: Tensor, sin: Tensor, *, kv_heads: int, q_norm: Tensor | None, k_norm: Tensor | None
) -> None:
    """Raises: ValueError as `rotary` does, for qkv of that shape."""
    batch, tokens, total = shape
    width = cos.shape[-1]
    if total % width or total // width - 2 * kv_heads < 1 or width % 2:
        raise ValueError(f"expected (Hq + 2 * {kv_heads}) * D={width} values a token, D even, got {total}")
    if cos.shape not in ((batch, tokens, width), (tokens, width)) or sin.shape != cos.shape:
        raise ValueError(
            f"expected cos and sin of shape [T={tokens}, D] or [B={batch}, T, D], got {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("expected both q_norm and k_norm or neither, got one of them")


def rotary_reference(
    qkv: Float[Tensor, "B T W"],
    cos: Float[Tensor, "*b T D"],
    sin: Float[Tensor, "*b T D"],
    *,
    kv_heads: int,
    q_norm: Float[Tensor, " D"] | None = None,
    k_norm: Float[Tensor, " D"] | None = None,
    eps: float = 0.0,
    offset: int = 0,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
    heads = qkv.unflatten(2, (-1, cos.shape[-1])).transpose(1, 2)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if cos.ndim == 3:  # positions differ by question: [B T D] beside [B H T D]
        cos, sin = cos[:, None], sin[:, None]
    if q_norm is None or k_norm is None:  # q and k are neighbours in memory: both at once are half as many operations
        q, k = _rotate(heads[:, :-kv_heads], cos, sin).split([q.shape[1], kv_heads], dim=1)
        return q, k, v
    q = rms_norm_reference(q, q_norm, eps=eps, offset=offset)
    k = rms_norm_reference(k, k_norm, eps=eps, offset=offset)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
