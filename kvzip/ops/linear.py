"""A linear layer, fused with the norm before it and the gate or residual after it."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.norm import rms_norm_reference
from kvzip.ops.types import Norm

GATES = ("silu", "gelu_tanh")


def linear(
    x: Float[Tensor, "*b K"],
    weight: Float[Tensor, "N K"],
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
) -> Float[Tensor, "*b M"]:
    """Returns x W^T + bias, of width M = N; each of the three switches adds one step.

    Args:
        norm: x is normed first.
        gate: "silu" or "gelu_tanh": the first half of the outputs goes through this function and multiplies the
            second half (SwiGLU, GeGLU; arXiv 2002.05202), so M = N / 2.
        residual: is added at the end.

    Raises: ValueError for an unknown gate or a residual of another shape.
    """
    width = weight.shape[0] // (1 if gate is None else 2)
    if gate is not None and (gate not in GATES or weight.shape[0] % 2):
        raise ValueError(f"expected a gate in {GATES} and an even number of outputs, got {gate!r}, {weight.shape[0]}")
    if weight.shape[1] != x.shape[-1] or (residual is not None and residual.shape != (*x.shape[:-1], width)):
        raise ValueError(
            f"expected a weight [N, K={x.shape[-1]}] and a residual {[*x.shape[:-1], width]}, got {list(weight.shape)} "
            f"and {None if residual is None else list(residual.shape)}: they must fit x {list(x.shape)}"
        )
    if use_triton(x):
        from kvzip.ops.triton.linear import linear_triton as run
    else:
        run = linear_reference
    return run(x, weight, bias, norm=norm, gate=gate, residual=residual)


def linear_reference(
    x: Float[Tensor, "*b K"],
    weight: Float[Tensor, "N K"],
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
) -> Float[Tensor, "*b M"]:
    if norm is not None:
        x = rms_norm_reference(x, norm.weight, eps=norm.eps, offset=norm.offset)
    out = F.linear(x, weight, bias)
    if gate is not None:
        first, second = out.chunk(2, dim=-1)
        out = (F.silu(first) if gate == "silu" else F.gelu(first, approximate="tanh")) * second
    return out if residual is None else residual + out
