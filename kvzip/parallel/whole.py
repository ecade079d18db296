"""Scores and selections over the heads of all ranks, which each of them computes whole and alike.

Scores are 4 bytes a pair, where a pair's keys and values are 512 in an 8B or 70B model: every rank holds those of all
heads, and chooses among them as one process does. So the choice is the same bit for bit, ties and NaN included.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float32, Int32
from torch import Tensor

from .. import ops
from .exchange import everyone, gathered
from .share import Share


def whole_scores(share: Share | None, values: Float32[Tensor, "L h E"]) -> Float32[Tensor, "L H E"]:
    """Returns the scores of all heads, given this rank's; ranks that share a head take the largest, or NaN."""
    if share is None:
        return values
    out = values.new_empty(values.shape[0], share.heads, values.shape[2])
    for whole, own in zip(out, values, strict=True):
        found = gathered(share, own)
        if share.repeats == 1:
            whole.copy_(found.flatten(0, 1))
        else:
            torch.amax(found.view(share.heads, share.repeats, -1), 1, out=whole)
    return out


def heads_of(share: Share | None, values: Tensor, axis: int = 1) -> Tensor:
    """Returns the part of a tensor over all heads that belongs to this rank's, a view."""
    return values if share is None else values.narrow(axis, share.own.start, share.own.stop - share.own.start)


def select_rows(
    share: Share | None, ranks: Sequence[Float32[Tensor, " _"]], *, count: int, nan: Int32[Tensor, " 1"] | None = None
) -> list[Bool[Tensor, " _"]]:
    """Returns which rows of this rank's heads are among the `count` highest of all, layer by layer.

    Equal ones are taken in the order of layer, head and row. `nan` is as in `ops.select`.

    Args:
        ranks: of each layer, the rows' ranks, head after head.
    """
    if share is None:
        return [mask[0] for mask in ops.select_count([x[None] for x in ranks], count=count, nan=nan)]
    sizes = everyone(share, [len(x) for x in ranks])
    whole, firsts = [], []
    for layer, own in enumerate(ranks):
        each = [sizes[n][layer] for n in range(share.size)]
        padded = torch.nn.functional.pad(own, (0, max(each) - len(own)))
        found = gathered(share, padded)
        parts = [found[n, : each[n]] for n in share.speakers]
        firsts.append(sum(each[n] for n in share.speakers if n < share.rank // share.repeats * share.repeats))
        whole.append(torch.cat(parts)[None])
    masks = ops.select_count(whole, count=count, nan=nan)
    return [mask[0, at : at + len(own)] for mask, at, own in zip(masks, firsts, ranks, strict=True)]
