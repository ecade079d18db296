"""The likeliest token of each row of logits."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kvzip.ops.backend import use_triton


def likeliest(scores: Float[Tensor, "B V"]) -> Int64[Tensor, " B"]:
    """Returns where each row is largest, the first place of several, and -1 where it has NaN or is all -inf.

    Raises: ValueError for rows without scores.
    """
    if scores.shape[1] == 0:
        raise ValueError(f"expected scores [B, V] with at least one a row, got {list(scores.shape)}")
    if use_triton(scores):
        from kvzip.ops.triton.likeliest import likeliest_triton as run
    else:
        run = likeliest_reference
    return run(scores)


def likeliest_reference(scores: Float[Tensor, "B V"]) -> Int64[Tensor, " B"]:
    top = scores.amax(-1, keepdim=True)
    places = torch.arange(scores.shape[1], device=scores.device)
    first = torch.where(scores == top, places, scores.shape[1]).amin(-1)  # of several `max` may find another
    return torch.where(top[:, 0] > -torch.inf, first, -1)
