"""Scores quantized to 8 bits: a table of at most 256 values, the levels, and an index into it for each score.

They are the levels of a quantizer, and have nothing to do with the level at which `compress` shares a budget.
"""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

MOST = 256
_SAMPLE = 1 << 20  # scores that levels are chosen from; more would move a level by less than 0.1% of the pairs


def encode_levels(values: Float32[Tensor, "L H E"]) -> tuple[UInt8[Tensor, "L H E"], Float32[Tensor, " K"]]:
    """Returns a code for each score and the levels that codes are indices of, ascending, K <= 256.

        levels[codes] <= values, and values < levels[codes + 1] where there is such a level

    Scores keep their order, but those with the same code become equal. Levels are quantiles of the scores, so that at
    any ratio, selecting by codes differs from selecting by scores in less than 1/256 of the pairs (0.4%). Scores of at
    most 256 different values, such as scores loaded from 8 bits, are kept exactly. Of more than a million scores only
    a sample is searched for these values, which may miss a rare one.

    Raises: ValueError for NaN.
    """
    if bool(values.isnan().any()):
        raise ValueError("expected scores without NaN to save in 8 bits, got some: score again in bfloat16 or float32")
    flat = values.flatten()
    if not len(flat):
        return values.to(torch.uint8), values.new_zeros(1)
    sample = torch.cat([flat[:: max(1, len(flat) // _SAMPLE)], flat.amin()[None], flat.amax()[None]]).sort().values
    levels = sample.unique_consecutive()
    if len(levels) > MOST:
        ranks = torch.arange(MOST, device=flat.device) * (len(sample) - 1) // (MOST - 1)
        levels = sample[ranks].unique_consecutive()
    inner = levels[1:].contiguous()  # every score is at least the lowest
    codes = [torch.bucketize(layer, inner, right=True, out_int32=True).to(torch.uint8) for layer in values]
    return torch.stack(codes), levels
