"""Attention over two disjoint sets of keys, from attention over each."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.backend import use_triton


def merge(
    a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Returns attention over two disjoint sets of keys from attention over each, with the log-sum-exp of both.

    out = (e^lse_a a + e^lse_b b) / (e^lse_a + e^lse_b), in the dtype of `a`. (0, -inf) is the identity, and two
    empty sets give it.
    """
    if use_triton(a):
        from kvzip.ops.triton.merge import merge_triton as run
    else:
        run = merge_reference
    return run(a, lse_a, b, lse_b)


def merge_reference(
    a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Plain PyTorch `merge`."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    weight_a, weight_b = torch.exp(lse_a - finite)[..., None], torch.exp(lse_b - finite)[..., None]
    return (weight_a * a + weight_b * b).to(a.dtype), lse
