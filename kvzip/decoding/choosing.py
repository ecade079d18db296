"""The next token of each row of logits: the likeliest, or one that is drawn; what an answer has said can cost."""

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ..ops import likeliest

NO_TOKEN = -1  # in place of a token where the logits are NaN or all -inf, as `likeliest` has it
CHOICES = 4  # numbers by which a token is chosen: temperature, top_p, draw, repetition penalty
GREEDY = (0.0, 1.0, 0.0, 1.0)  # of them, for the likeliest token


def choose(
    scores: Float[Tensor, "B V"], by: Float64[Tensor, "4 B"], *, sampled: bool, said: Bool[Tensor, "B V"] | None
) -> Int64[Tensor, " B"]:
    """Returns the token of each row, NO_TOKEN where its logits are NaN or all -inf.

    Args:
        by: temperature, top_p, draw and repetition penalty of each row. Temperature 0 takes the likeliest token,
            otherwise `draw`, uniform in [0, 1), chooses.
        sampled: whether a row has a temperature above 0.
        said: the tokens that each row's answer has; None if no row has a penalty above 1.
    """
    temperature, top_p, draw, penalty = by[:, :, None]
    if said is not None:
        scores = penalize(scores, said, penalty.float())
    tokens = likeliest(scores)
    if not sampled:
        return tokens
    drawn = sample(scores, draw.float(), temperature=temperature.clamp(min=5e-324), top_p=top_p)
    return torch.where((temperature[:, 0] > 0) & (tokens != NO_TOKEN), drawn, tokens)


def penalize(
    scores: Float[Tensor, "B V"], said: Bool[Tensor, "B V"], penalty: Float32[Tensor, "*own"]
) -> Float[Tensor, "B V"]:
    """Returns scores in which those of tokens that were said are divided by the penalty, or multiplied if negative.

    The penalty is one for all rows, or [B 1], one for each.

    Source: CTRL, arXiv 1909.05858, section 4.1, with the rule for negative scores that Transformers has.
    """
    less = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(said, less, scores).to(scores.dtype)


def sample(
    scores: Float[Tensor, "B V"],
    draw: Float32[Tensor, "*each 1"],
    *,
    temperature: Float[Tensor, "*own"],
    top_p: Float[Tensor, "*own"],
) -> Int64[Tensor, " B"]:
    """Returns a token of each row, drawn from softmax(scores / temperature) among the most likely that sum to top_p.

    Draw, temperature and top_p are one for all rows, or [B 1], one for each.

    It inverts the cumulative probabilities at `draw`, uniform in [0, 1), so that the host does not wait for the device.
    Sums are float64: no temperature above 0 turns finite scores into NaN, and a top_p just below 1 differs from 1.
    Infinite scores share all of the probability. A row with NaN gives an arbitrary token.
    """
    ordered, tokens = scores.sort(stable=True, dim=-1, descending=True)
    wide = ordered.double()
    below = torch.where(wide == wide[:, :1], 0.0, wide - wide[:, :1])
    weights = torch.exp(below / temperature.double())  # at most 1
    reached = weights.cumsum(-1)
    before = reached - weights
    weights = weights.masked_fill(before >= top_p * reached[:, -1:], 0)  # the first always stays
    reached = weights.cumsum(-1)
    place = (reached <= draw * reached[:, -1:]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    return tokens.gather(1, place)[:, 0]
