"""A linear layer, fused with the norm before it and the gate or residual after it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.backend import is_forced, use_triton
from kvzip.ops.norm import rms_norm_reference
from kvzip.ops.types import Norm
from kvzip.ops.weights import QuantizedWeight, blocks, expand, round_inputs

GATES = ("silu", "gelu_tanh")
_FEW_ROWS = 16  # more are faster expanded
_VECTOR = 32  # inputs: twice the widest that torch takes at a time


def linear(
    x: Float[Tensor, "*b K"],
    weight: Float[Tensor, "N K"] | QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
) -> Float[Tensor, "*b M"]:
    """Returns x W^T + bias, of width M = N; each of the three switches adds one step.

    Args:
        weight: quantized ones are used as what their codes mean, and x is rounded first if they have `activations`.
        norm: x is normed first.
        gate: "silu" or "gelu_tanh": the first half of the outputs goes through this function and multiplies the
            second half (SwiGLU, GeGLU; arXiv 2002.05202), so M = N / 2.
        residual: is added at the end.

    Raises: ValueError for an unknown gate or a residual of another shape.
    """
    check_linear(x, weight, gate, residual)
    if use_triton(x):
        from kvzip.ops.triton.linear import linear_triton as run
    elif not is_forced() and isinstance(weight, QuantizedWeight) and _suits_integers(x, weight):
        return _linear_integers(x, weight, bias, norm=norm, gate=gate, residual=residual)
    else:
        run = linear_reference
    return run(x, weight, bias, norm=norm, gate=gate, residual=residual)


def check_linear(x: Tensor, weight: Tensor | QuantizedWeight, gate: str | None, residual: Tensor | None) -> None:
    """Raises: ValueError as `linear` does."""
    width = weight.shape[0] // (1 if gate is None else 2)
    if gate is not None and (gate not in GATES or weight.shape[0] % 2):
        raise ValueError(f"expected a gate in {GATES} and an even number of outputs, got {gate!r}, {weight.shape[0]}")
    if weight.shape[1] != x.shape[-1] or (residual is not None and residual.shape != (*x.shape[:-1], width)):
        raise ValueError(
            f"expected a weight [N, K={x.shape[-1]}] and a residual {[*x.shape[:-1], width]}, got {list(weight.shape)} "
            f"and {None if residual is None else list(residual.shape)}: they must fit x {list(x.shape)}"
        )


def linear_reference(
    x: Float[Tensor, "*b K"],
    weight: Float[Tensor, "N K"] | QuantizedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: Float[Tensor, "*b M"] | None = None,
) -> Float[Tensor, "*b M"]:
    if norm is not None:
        x = rms_norm_reference(x, norm.weight, eps=norm.eps, offset=norm.offset)
    if isinstance(weight, Tensor):
        out = F.linear(x, weight, bias)
    else:
        if weight.activations is not None:
            x = round_inputs(x, weight.activations)
        parts = [F.linear(x, expand(weight, x.dtype, start=start, stop=stop)) for start, stop in blocks(weight)]
        out = torch.cat(parts, -1) if bias is None else torch.cat(parts, -1) + bias
    return _finished(out, gate, residual)


def _finished(out: Tensor, gate: str | None, residual: Tensor | None) -> Tensor:
    if gate is not None:
        first, second = out.chunk(2, dim=-1)
        out = (F.silu(first) if gate == "silu" else F.gelu(first, approximate="tanh")) * second
    return out if residual is None else residual + out


def _suits_integers(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether torch's own product with 8-bit integers takes these: few rows of bfloat16, a scale for each output.

    It reads whole vectors: beyond the end of rows that are no multiple of one.
    """
    plain = weight.kind == "int8" and weight.group == weight.inputs and weight.zero is None
    plain = plain and weight.inputs % _VECTOR == 0
    few = 0 < x.numel() <= _FEW_ROWS * x.shape[-1]
    return plain and few and x.dtype == torch.bfloat16 and x.device.type == "cpu" and weight.codes.is_contiguous()


def _linear_integers(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    norm: Norm | None,
    gate: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`linear_reference` without expanding weights; scales in float32, as torch would round them to bfloat16."""
    if norm is not None:
        x = rms_norm_reference(x, norm.weight, eps=norm.eps, offset=norm.offset)
    if weight.activations is not None:
        x = round_inputs(x, weight.activations)
    ones = torch.ones(weight.shape[0], dtype=x.dtype)
    out = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), weight.codes, ones).float()
    scale = weight.scale[:, 0].float()
    out *= scale if weight.rows == 1 else scale.repeat_interleave(weight.rows)[: weight.shape[0]]
    out = out if bias is None else out + bias.float()
    return _finished(out.to(x.dtype).view(*x.shape[:-1], -1), gate, residual)
