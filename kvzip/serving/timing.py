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
    over answers of their tokens after the first, each divided by the seconds that they took. An answer that came in one
    part counts from when it was asked for, with all its tokens.
    """

    answers: int
    first_s: float
    slowest_first_s: float
    token_s: float
    p99_s: float
    tokens_per_s: float


def pace(begun: Sequence[float], times: Sequence[Sequence[float]], tokens: Sequence[int] | None = None) -> Pace:
    """Returns the pace of answers.

    Args:
        begun: when each was asked for, seconds of any clock.
        times: when something of each came, the same clock. A reader that was busy sees several tokens come at a time.
        tokens: of each answer; None: one at each time.

    Raises: ValueError for no answers, and for an answer of which nothing came.
    """
    if not times or not all(times):
        raise ValueError("expected answers of which something came, got none: ask for more tokens")
    counts = [len(own) for own in times] if tokens is None else tokens
    first = [own[0] - asked for asked, own in zip(begun, times, strict=True)]
    # Of each answer: the tokens after the first of its times, and the times.
    followed = [
        (n - 1, own) if len(own) > 1 else (n, [asked, *own]) for n, asked, own in zip(counts, begun, times, strict=True)
    ]
    gaps = sorted(later - sooner for _, own in followed for sooner, later in pairwise(own))
    return Pace(
        answers=len(times),
        first_s=statistics.median(first),
        slowest_first_s=max(first),
        token_s=statistics.median(gaps),
        p99_s=gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        tokens_per_s=sum(n / (own[-1] - own[0]) for n, own in followed),
    )


def pace_of(handles: Sequence[Handle], timeout: SupportsFloat | None = None) -> Pace:
    """Waits for answers and returns their pace. Raises as `Handle.result` and `pace` do."""
    for handle in handles:
        handle.result(timeout)
    return pace([handle.begun for handle in handles], [handle.times for handle in handles])
