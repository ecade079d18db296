"""Scores in 8 bits: the levels that divide them evenly, and which level each one has."""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

LEVELS = 256
_SAMPLE = 1 << 20  # scores that levels are chosen from: more would not move them by a thousandth of the pairs


def encode_levels(values: Float32[Tensor, "L H E"]) -> tuple[UInt8[Tensor, "L H E"], Float32[Tensor, " K"]]:
    """Returns a code for each score and the levels that the codes count, ascending, K <= 256.

        levels[codes] <= values, and values < levels[codes + 1] where there is such a level

    The order of scores is kept, but for those of one level, which become equal; about as many scores lie in each
    level, so that selecting by codes differs from selecting by scores in less than a level, 0.4% of the pairs, at any
    ratio. Scores of at most 256 different values, as those that were in 8 bits before, come back exactly (past a
    million, if each value is frequent enough to be met in a sample).

    Raises: ValueError for NaN.
    """
    if bool(values.isnan().any()):
        raise ValueError("expected scores without NaN to save in 8 bits, got some: score again in bfloat16 or float32")
    flat = values.flatten()
    if not len(flat):
        return values.to(torch.uint8), values.new_zeros(1)
    sample = torch.cat([flat[:: max(1, len(flat) // _SAMPLE)], flat.amin()[None], flat.amax()[None]]).sort().values
    levels = sample.unique_consecutive()
    if len(levels) > LEVELS:
        ranks = torch.arange(LEVELS, device=flat.device) * (len(sample) - 1) // (LEVELS - 1)
        levels = sample[ranks].unique_consecutive()
    inner = levels[1:].contiguous()  # the lowest needs no comparison
    codes = [torch.bucketize(layer, inner, right=True, out_int32=True).to(torch.uint8) for layer in values]
    return torch.stack(codes), levels
