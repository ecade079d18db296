"""Queries, keys and values of new tokens on the GPU: of one token in one launch."""

from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.linear import has_columns, linear_triton, normed, row_kernel
from kvzip.ops.triton.linear_columns import column_products
from kvzip.ops.triton.rotary import make_rotation, rotate_heads
from kvzip.ops.types import Norm, TailTensors
from kvzip.ops.weights import QuantizedWeight


def project_triton(
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
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
    """`project`: a program of the kernel for one row has halves of a head, and rotates and appends what it computed.

    Each launch of a step costs more than a microsecond, however little it does: docs/tuning.md. Where there are more
    rows, or heads are normed, one kernel rotates and appends what the product has stored, or adds up its parts first.
    """
    width = cos.shape[-1]
    run = row_kernel(x, weight, norm) if q_norm is None else None
    if run is None:
        sums = None
        if has_columns(x, weight):
            qkv, sums = column_products(normed(x, norm), weight, bias)
        else:
            qkv = linear_triton(x, weight, bias, norm=norm)
        how = {"q_norm": q_norm, "k_norm": k_norm, "eps": norm.eps, "offset": norm.offset, "tail": tail}
        return rotate_heads(qkv, cos, sin, kv_heads=kv_heads, **how, sums=sums, bias=None if sums is None else bias)
    count = weight.shape[0] // width - 2 * kv_heads
    rotation = make_rotation(cos, sin, heads=count, kv_heads=kv_heads, tail=tail)
    heads = run(x, weight, bias, norm=norm, rotation=rotation).unflatten(2, (-1, width)).transpose(1, 2)
    q, k, v = heads.split([count, kv_heads, kv_heads], dim=1)
    return q, k, v
