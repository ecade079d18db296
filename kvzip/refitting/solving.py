"""Solves the systems of a fit: weights within bounds, values near the old ones, and what is taken of them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..options import Refitting
from .systems import Systems

WEIGHT_STEPS = 30  # 99.9% of the gain of the least value, on heads of real contexts
VALUE_STEPS = 10
BOUND_STEPS = 4
LEAST = 1e-5  # of a system's energy: a smaller gain is within the rounding of float32 sums


@dataclass(frozen=True)
class Fit:
    """What the rows of some systems get: log weights and changes of their values; 0 where a fit did not help.

    mass: the parts of each head's mass on its chunk that the rows carry at weight 1 and with these weights.
    """

    bias: Float[Tensor, "B t"]
    change: Float[Tensor, "B t D"]
    mass: tuple[Float[Tensor, " B"], Float[Tensor, " B"]]


def solve(systems: Systems, options: Refitting, dtype: torch.dtype) -> Fit:
    """Returns the fit of each head. `dtype` is that of the stored values, which must be able to hold the new ones."""
    one = torch.ones_like(systems.load)
    w, change = fit_weights(systems, options), torch.zeros_like(systems.old)
    rates = [error(systems, one, systems.old), error(systems, w, systems.old)]
    if options.values:
        change = fit_values(systems, w, options)
        new = systems.old + change
        fits = (new + systems.mean[:, None]).abs().amax((1, 2)) <= torch.finfo(dtype).max
        rates.append(error(systems, w, new).masked_fill(~fits, torch.inf))
    before, *others = rates
    after, best = torch.stack(others).min(0)
    taken = after < before - LEAST * systems.energy  # False for NaN
    w = w.masked_fill(~taken[:, None], 1.0)  # not `where`, which waits to copy a number to the device
    change = change.masked_fill(~(taken & (best == 1))[:, None, None], 0.0)
    parts = (systems.reach.sum(1), (systems.reach * w).sum(1))
    return Fit(w.log(), change, parts)


def error(systems: Systems, w: Float[Tensor, "B t"], values: Float[Tensor, "B t D"]) -> Float[Tensor, " B"]:
    """Returns the objective of `kvzip.refit` for weights and values (less the mean), without its constant `energy`."""
    scaled = values * w[..., None]
    off = (torch.einsum("bij,bj->bi", systems.gram, w) - 2 * systems.load) * w
    moved = (torch.bmm(systems.gram, scaled) - 2 * systems.cross) * scaled
    return systems.spread * off.sum(1) + moved.sum((1, 2))


def fit_weights(systems: Systems, options: Refitting) -> Float[Tensor, "B t"]:
    """Returns weights within [e^-bound, e^bound] that nearly minimize |p w - m|^2 + ridge * mean(diag p'p) * |w - 1|^2.

    By accelerated projected gradients in the metric of the row sums of p'p: as no entry is negative, the matrix of
    these sums is above p'p, so that a step of 1 descends.
    """
    diagonal = systems.gram.diagonal(dim1=1, dim2=2).sum(1) / systems.counts.clamp(min=1)
    ridge = options.ridge * diagonal[:, None]
    gram = systems.gram.clone()
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    pulled = (systems.load + ridge)[..., None]
    rate = 1 / gram.sum(2, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    low, high = math.exp(-options.bound), math.exp(options.bound)
    w = ahead = torch.ones_like(pulled)
    t = 1.0
    for _ in range(WEIGHT_STEPS):
        slope = torch.baddbmm(pulled, gram, ahead, beta=-1)
        new = torch.addcmul(ahead, slope, rate, value=-1).clamp_(low, high)
        later = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead = torch.lerp(w, new, 1 + (t - 1) / later)
        w, t = new, later
    return w[..., 0]


def fit_values(systems: Systems, w: Float[Tensor, "B t"], options: Refitting) -> Float[Tensor, "B t D"]:
    """Returns changes z of the values that nearly minimize |p w (old + z) - y|^2 + pull * a * |z|^2.

    a = |W p'p W|_F^2 / tr(W p'p W), W = diag(w): between the mean and the largest eigenvalue. By Chebyshev's iteration
    from 0, which lowers this sum and is linear in what it is given. (Conjugate gradients need fewer steps, but amplify
    rounding: with inputs that differ by 1e-15 they gave values that differ by 2e-3.)
    """
    weighted = (systems.gram * w[:, :, None]).mul_(w[:, None])
    trace = weighted.diagonal(dim1=1, dim2=2).sum(1)
    norm = torch.linalg.vector_norm(weighted, dim=(1, 2))
    ridge = options.pull * norm.square() / trace.clamp_min(torch.finfo(w.dtype).tiny)
    tiny = torch.finfo(w.dtype).tiny
    half = (largest(weighted, norm) / 2).clamp_min(tiny)
    first, keep, more = (x[..., None, None] for x in chebyshev(ridge / half, half, VALUE_STEPS))
    rest = torch.baddbmm(systems.cross * w[..., None], weighted, systems.old, alpha=-1)
    weighted.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    z = step = first * rest
    for n in range(VALUE_STEPS - 1):
        rest = torch.baddbmm(rest, weighted, step, alpha=-1)
        step = torch.addcmul(keep[n] * step, more[n], rest)
        z = z + step
    return z


def chebyshev(
    part: Float[Tensor, " B"], half: Float[Tensor, " B"], steps: int
) -> tuple[Float[Tensor, " B"], Float[Tensor, "n B"], Float[Tensor, "n B"]]:
    """Returns the factors of Chebyshev's iteration for eigenvalues from part * half to (part + 2) * half.

    The first step is first * rest, the others are keep[n] * (the last step) + more[n] * rest. With 1 + part = cosh(a)
    and rate[n] = cosh(n a) / cosh((n + 1) a), that is rate[0] = 1 / cosh(a), rate[n] = 1 / (2 cosh(a) - rate[n - 1]):
    keep[n] = rate[n] rate[n + 1], more[n] = 2 rate[n + 1] / half.
    """
    angle = torch.log1p(part + part.sqrt() * (2 + part).sqrt())
    n = torch.arange(steps + 1, dtype=part.dtype, device=part.device)[:, None]
    small = torch.exp(-2 * n * angle)
    rate = torch.exp(-angle) * (1 + small[:-1]) / (1 + small[1:])
    return 1 / (half * (1 + part)), rate[:-1] * rate[1:], 2 * rate[1:] / half


def largest(matrix: Float[Tensor, "B t t"], norm: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Returns bounds of the largest eigenvalues of matrices without negative entries, whose Frobenius norm is `norm`.

    For x > 0 no eigenvalue is above the largest (matrix x)[i] / x[i]; x is what a few powers make of the row sums.
    """
    x, bound = matrix.sum(2), norm
    for _ in range(BOUND_STEPS):
        y = torch.bmm(matrix, x[..., None])[..., 0]
        bound = torch.minimum(bound, (y / x).masked_fill(~(x > 0), 0.0).amax(1))
        x = y / y.amax(1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    return bound
