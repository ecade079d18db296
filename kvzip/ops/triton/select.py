"""Exact selection by narrowing a range of keys, with no host sync and no sort.

A score's key is its float bits mapped to uint32 so that keys order as scores do (-0.0 as 0.0, NaN as -inf). The
`count`-th highest key is found by rounds: a histogram of the keys that lie in the range [low, low + span] in 2**14
bins, and how many lie above it, then the bin in which the count-th falls is the next range. The first round looks at
a sample and only guesses a range around the rank; a full round that finds the guess wrong turns to the part above or
below, so the guess costs time and never exactness. Full range, 2**18, 2**4, 1 key: four rounds after the guess always
end, two as a rule, and a round whose range is one key returns at once.

Each step is a function over [P, n]: P problems of n scores. `select_count` is one problem, `select_uniform` one for
each head. Heads split over devices take the same steps: add the histograms of all parts before `narrow_`, and give
`settle_` the ties that lie before each block in the unsplit order (the shard test is written out).

    state = begin(P, ...); for each round: histogram -> (all-reduce) -> narrow_; mark -> (all-gather ties) -> settle_

Bytes: the scores are read 3 times as a rule (two rounds and `mark`), 5 at most, plus n/128 sampled and the mask
written once. For 32 x 8 x 131,072 that is 0.44 GB.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float32, Int32, Int64
from torch import Tensor

BINS = tl.constexpr(2**14)
BLOCK = 8192  # scores of one program; H100, 2026-11-24
SAMPLES = 2**18
ROUNDS = 4  # full rounds after the sampled one, enough from any guess
LOW, SPAN, ABOVE, SHIFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # columns of a state


def select_count_triton(scores, *, count: int, nan: Int32[Tensor, " 1"] | None = None):
    if isinstance(scores, Tensor):
        keep = _select(scores.reshape(1, -1), count, nan)
        return keep.view(scores.shape)
    flat = torch.cat([layer.reshape(-1) for layer in scores])
    parts = _select(flat[None], count, nan)[0].split([layer.numel() for layer in scores])
    return [part.view(layer.shape) for part, layer in zip(parts, scores, strict=True)]


def select_uniform_triton(
    scores: Float32[Tensor, "L H E"], *, ratio: float, nan: Int32[Tensor, " 1"] | None = None
) -> Bool[Tensor, "L H E"]:
    keep = _select(scores.reshape(-1, scores.shape[-1]), int(ratio * scores.shape[-1]), nan)
    return keep.view(scores.shape)


def _select(scores: Float32[Tensor, "P n"], count: int, nan: Tensor | None) -> Bool[Tensor, "P n"]:
    if scores.numel() == 0:
        return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    scores = scores.contiguous()
    state = begin(scores.shape[0], scores.device)
    n = scores.shape[1]
    for index in range(ROUNDS + 1):
        counts = histogram(scores, state, step=sample_step(n) if index == 0 else 1, nan=nan if index == 1 else None)
        narrow_(state, counts, count=count, total=n, guess=index == 0)
    keep, ties = mark(scores, state)
    settle_(keep, scores, state, ties.cumsum(1) - ties, ties, count=count)
    return keep


def sample_step(n: int) -> int:
    """Every how many-th of n scores the first round looks at. Odd, so that it walks through heads of 2**k tokens."""
    return n // SAMPLES | 1


def begin(problems: int, device: torch.device) -> Int64[Tensor, "P 4"]:
    """The state of P selections before the first round: every key is in range."""
    state = torch.tensor([0, 2**32 - 1, 0, 32 - 14], dtype=torch.int64)
    return state.to(device, non_blocking=True).repeat(problems, 1)


def histogram(
    scores: Float32[Tensor, "P n"], state: Int64[Tensor, "P 4"], *, step: int = 1, nan: Int32[Tensor, " 1"] | None = None
) -> Int64[Tensor, "P bins"]:
    """How many keys of every `step`-th score lie in each bin of the range, and in the last column how many above.

    Sets `nan` to 1 where a score is NaN. Zero where the range is one key already.
    """
    problems, n = scores.shape
    counts = torch.zeros(problems, BINS + 1, dtype=torch.int64, device=scores.device)
    seen = triton.cdiv(n, step)
    blocks = triton.cdiv(seen, BLOCK)
    _histogram_kernel[(problems * blocks,)](
        scores, state, counts, nan, n, seen, step, blocks, state.stride(0), BLOCK=BLOCK, num_warps=8
    )
    return counts


def narrow_(
    state: Int64[Tensor, "P 4"], counts: Int64[Tensor, "P bins"], *, count: int, total: int, guess: bool = False
) -> None:
    """Moves each state to the bin that holds the count-th highest key.

    Args:
        total: n, over all parts if the histogram was added up.
        guess: the histogram is that of a sample: take the bins around the rank, with a margin.
    """
    _narrow_kernel[(len(state),)](state, counts, count, total, GUESS=guess, num_warps=16)
