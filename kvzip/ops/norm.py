"""RMSNorm, and a residual added to it."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.backend import use_triton


def rms_norm(
    x: Float[Tensor, "*b N"],
    weight: Float[Tensor, " N"],
    *,
    eps: float,
    offset: int = 0,
    residual: Float[Tensor, "*b N"] | None = None,
) -> Float[Tensor, "*b N"]:
    """Returns x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, plus `residual` if there is one.

    Args:
        offset: 1 for Gemma, whose checkpoints store the weights minus 1 and which casts to x's dtype after the product
            with them; 0 for the others.

    Raises: ValueError if shapes do not fit together.
    Source: arXiv 1910.07467.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"expected a weight of {list(x.shape[-1:])} and a residual of {list(x.shape)}, got {list(weight.shape)} "
            f"and {None if residual is None else list(residual.shape)}: they must fit x"
        )
    if use_triton(x):
        from kvzip.ops.triton.norm import rms_norm_triton as run
    else:
        run = rms_norm_reference
    return run(x, weight, eps=eps, offset=offset, residual=residual)


def rms_norm_reference(
    x: Float[Tensor, "*b N"],
    weight: Float[Tensor, " N"],
    *,
    eps: float,
    offset: int = 0,
    residual: Float[Tensor, "*b N"] | None = None,
) -> Float[Tensor, "*b N"]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = (normed * (offset + weight.to(wide.dtype))).to(x.dtype) if offset else weight * normed.to(x.dtype)
    return out if residual is None else residual + out
