"""Queries, keys and values of new tokens in one step: projected, normed per head in some models, rotated, appended."""

from jaxtyping import Float
from torch import Tensor

from kvzip.ops.append import append_reference_, check_append
from kvzip.ops.backend import is_forced, use_triton
from kvzip.ops.linear import check_linear, linear, linear_reference
from kvzip.ops.rotary import check_rotary, rotary_reference
from kvzip.ops.types import Norm, TailTensors
from kvzip.ops.weights import QuantizedWeight

Heads = tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]


def project(
    x: Float[Tensor, "B T K"],
    weight: Float[Tensor, "W K"] | QuantizedWeight,
    bias: Float[Tensor, " W"] | None = None,
    *,
    norm: Norm,
    cos: Float[Tensor, "*b T D"],
    sin: Float[Tensor, "*b T D"],
    kv_heads: int,
    q_norm: Float[Tensor, " D"] | None = None,
    k_norm: Float[Tensor, " D"] | None = None,
    tail: TailTensors | None = None,
) -> Heads:
    """Returns `rotary` of `linear(x, weight, bias, norm=norm)`: q, k and v of T tokens of B questions.

    Args:
        norm: of the input; its eps and offset are also those of q_norm and k_norm.
        tail: keys, values and lengths of each question's tail, to which `append_` writes k and v besides.

    Raises: ValueError if shapes do not fit together, as `linear`, `rotary` and `append_` do.
    """
    check_linear(x, weight, None, None)
    check_rotary([*x.shape[:2], weight.shape[0]], cos, sin, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm)
    if tail is not None:
        check_append(*tail, (x.shape[0], kv_heads, x.shape[1], cos.shape[-1]), x.dtype)
    how = {"norm": norm, "cos": cos, "sin": sin, "kv_heads": kv_heads, "q_norm": q_norm, "k_norm": k_norm, "tail": tail}
    if use_triton(x):
        from kvzip.ops.triton.project import project_triton

        return project_triton(x, weight, bias, **how)
    if is_forced():
        return project_reference(x, weight, bias, **how)
    return _split(linear(x, weight, bias, norm=norm), norm, cos, sin, kv_heads, q_norm, k_norm, tail)


def project_reference(
    x: Float[Tensor, "B T K"],
    weight: Float[Tensor, "W K"] | QuantizedWeight,
    bias: Float[Tensor, " W"] | None = None,
    *,
    norm: Norm,
    cos: Float[Tensor, "*b T D"],
    sin: Float[Tensor, "*b T D"],
    kv_heads: int,
    q_norm: Float[Tensor, " D"] | None = None,
    k_norm: Float[Tensor, " D"] | None = None,
    tail: TailTensors | None = None,
) -> Heads:
    qkv = linear_reference(x, weight, bias, norm=norm)
    return _split(qkv, norm, cos, sin, kv_heads, q_norm, k_norm, tail)


def _split(
    qkv: Tensor,
    norm: Norm,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: TailTensors | None,
) -> Heads:
    q, k, v = rotary_reference(
        qkv, cos, sin, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm, eps=norm.eps, offset=norm.offset
    )
    if tail is not None:
        append_reference_(*tail, k, v)
    return q, k, v
