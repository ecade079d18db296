"""What readers wait for: times of first tokens and of those that follow, from the handles of their answers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import SupportsFloat

from .handles import Handle


@dataclass(frozen=True)
class Pace:
    """What the readers of several answers saw.

    first_s: seconds from asking to the first token, the median; slowest_first_s the longest. token_s: seconds from a
    token to the next one, the median over all tokens of all answers; p99_s the 99th percentile. tokens_per_s: the sum
    over answers of their tokens after the first, each divided by the seconds that they took.
    """

    answers: int
    first_s: float
    slowest_first_s: float
    token_s: float
    p99_s: float
    tokens_per_s: float


def pace(begun: Sequence[float], times: Sequence[Sequence[float]], tokens: Sequence[int] | None = None) -> Pace:
    """Returns the pace of answers of at least two tokens.

    Args:
        begun: when each was asked for, seconds of any clock.
        times: when something of each came, the same clock.
        tokens: of each answer, where several may have come at a time; None: one at each time.

    Raises: ValueError for an answer that came at once, which has no pace.
    """
    if not times or min(map(len, times)) < 2:
        raise ValueError("expected answers that come in at least two parts, got one that does not: ask for more tokens")
    counts = [len(own) for own in times] if tokens is None else tokens
    first = [own[0] - asked for asked, own in zip(begun, times, strict=True)]
    gaps = sorted(later - sooner for own in times for sooner, later in pairwise(own))
    return Pace(
        answers=len(times),
        first_s=statistics.median(first),
        slowest_first_s=max(first),
        token_s=statistics.median(gaps),
        p99_s=gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        tokens_per_s=sum((n - 1) / (own[-1] - own[0]) for n, own in zip(counts, times, strict=True)),
    )


def pace_of(handles: Sequence[Handle], timeout: SupportsFloat | None = None) -> Pace:
    """Waits for answers and returns their pace. Raises as `Handle.result` and `pace` do."""
    for handle in handles:
        handle.result(timeout)
    return pace([handle.begun for handle in handles], [handle.times for handle in handles])
