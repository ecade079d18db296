"""How a paper shares its budget among heads or layers, as an order of the pairs.

If what a rule keeps only grows with the budget, a pair's value is minus the smallest budget at which the rule keeps it;
`compress` then keeps what the rule does at any ratio.
"""

from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor


def recent_and_heavy(values: Float32[Tensor, "L H E"]) -> Float32[Tensor, "L H E"]:
    """Returns values by which each head keeps as many of its last tokens as of the highest others, at any budget.

    The sets are nested: a token that becomes a recent one makes room for the next heaviest.
    """
    heaviest = values.argsort(dim=-1, descending=True, stable=True).flatten(0, 1).tolist()
    orders = torch.tensor([_taken_in(row) for row in heaviest], device=values.device).view(values.shape)
    return -orders.argsort(dim=-1).float()


def _taken_in(heaviest: list[int]) -> list[int]:
    """Token indices in the order in which one head adds them, from all of them with the heaviest first."""
    order: list[int] = []
    taken = [False] * len(heaviest)
    heavy = iter(heaviest)
    for recent in reversed(range(len(heaviest))):
        was_heavy = taken[recent]
        if not was_heavy:
            taken[recent] = True
            order.append(recent)
        for token in islice((own for own in heavy if not taken[own]), 1 + was_heavy):
            taken[token] = True
            order.append(token)
    return order


def pyramidal(values: Float32[Tensor, "L H E"], *, window: int, beta: float = 20.0) -> Float32[Tensor, "L H E"]:
    """Returns values by which layers keep what PyramidKV gives them when a fraction r of all pairs is kept.

    Every head keeps its last `window` pairs: their values stay, which are above 0. Of the other E - window pairs, the
    first layer holds the fraction (2 - 1/beta) r and the last one r / beta, with equal steps between. Where the first
    would exceed 1, the fractions go from 1 down to 2 r - 1. A pair of rank j among the others has the value -r at
    which its layer's fraction reaches (j + 1/2) / (E - window).
    """
    layers, _, evictable = values.shape
    others = evictable - min(window, evictable)
    fraction = (rank(values[..., :others]).double() + 0.5) / max(1, others)
    depth = torch.linspace(0, 1, layers, dtype=torch.float64, device=values.device)[:, None, None]
    if layers == 1:
        depth += 0.5
    slope = (2 - 1 / beta) - depth * (2 - 2 / beta)
    turn = 1 / (2 - 1 / beta)  # the ratio at which the first layer is full
    needed = torch.where(fraction <= turn * slope, fraction / slope, 1 - (1 - fraction) / (2 * depth).clamp(min=1e-9))
    return torch.cat([-needed.float(), values[..., others:]], dim=-1)


def adaptive(values: Float32[Tensor, "L H E"], *, alpha: float = 0.2) -> Float32[Tensor, "L H E"]:
    """Returns values by which the heads of a layer keep what AdaKV gives them, at any budget of the layer.

    At m pairs in a layer of H heads, of which c_h(m) of the m highest belong to head h, that head holds its

        b_h(m) = (1 - alpha) c_h(m) + alpha m / H

    highest, rounded: a share alpha is divided equally, the rest goes where the scores are. The sum over heads is m, and
    b_h only grows, so a pair of rank j in its head has the value -m at which b_h(m) reaches j + 1/2; between whole m,
    b_h is taken to be linear.

    Source: AdaKV, arXiv 2407.11550: its allocation with the safeguard, as in its authors' code. In kvpress a head holds
    the larger of both parts instead of their sum.
    """
    return torch.stack([_adaptive_layer(layer, alpha) for layer in values])


def _adaptive_layer(values: Float32[Tensor, "H E"], alpha: float) -> Float32[Tensor, "H E"]:
    heads, evictable = values.shape
    owner = values.flatten().argsort(descending=True, stable=True) // evictable
    taken = F.one_hot(owner, heads).T.double().cumsum(-1)  # [H H*E], c_h(1), c_h(2) ...
    budget = (1 - alpha) * taken + alpha / heads * torch.arange(1, heads * evictable + 1, device=values.device)
    budget = F.pad(budget, (1, 0))
    wanted = (torch.arange(evictable, device=values.device, dtype=torch.float64) + 0.5).expand(heads, -1).contiguous()
    after = torch.searchsorted(budget, wanted).clamp(max=heads * evictable)
    low, high = budget.gather(1, after - 1), budget.gather(1, after)
    reached = after - 1 + (wanted - low) / (high - low).clamp(min=1e-12)
    return -rank(-reached.gather(1, rank(values)).flatten()).view_as(values).float()  # ranks are exact in float32


def rank(values: Float[Tensor, "*b E"]) -> Int64[Tensor, "*b E"]:
    """The rank of each value along the last axis: 0 for the highest, equal ones in index order."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
