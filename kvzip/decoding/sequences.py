"""Sequences: questions with their answers, as they are decoded, and the parts of them that a step runs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..answers import Answer, Stream
from ..options import Sampling
from .choosing import GREEDY, NO_TOKEN


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A question and its answer. Tokens of both are in a tail, after `past` tokens that its context has there already.

    The tail begins at position `start`, and belongs to `slot`. Its rows are in `pages` where memory is in pages, and
    `place` is then where its context is: which table, and the place in it.
    """

    ids: list[int]
    sampling: Sampling
    draws: list[float]
    limit: int  # tokens of the answer, at most
    past: int
    start: int
    stream: Stream | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    place: tuple[int, int] = (0, -1)
    times: list[float] = field(default_factory=list)  # of its tokens, time.monotonic()
    read: int = 0  # question tokens launched
    asked: int = 0  # answer tokens launched
    got: int = 0  # answer tokens received
    under_way: int = 0  # steps launched that have not been received
    answer: Answer | None = None
    error: BaseException | None = None
    over: bool = False

    @property
    def left(self) -> int:
        """Question tokens that are not launched."""
        return 0 if self.over else len(self.ids) - self.read

    @property
    def decodes(self) -> bool:
        """Whether the next step reads its last token."""
        return not self.over and self.read == len(self.ids) and self.asked < self.limit


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True)
class Part(Generic[S]):
    """What a step runs of a sequence: `tokens`, NO_TOKEN for its last one, from row `first` of its tail on.

    `by` is how the next token is chosen, see `choosing.choose`; `gives` whether that is one of the answer.
    """

    sequence: S
    tokens: list[int]
    first: int
    by: tuple[float, float, float, float]
    gives: bool


def next_parts(sequences: list[S], counts: Mapping[S, int] | None = None) -> list[Part[S]]:
    """Returns what the next step runs, and counts it as launched: the last token of each answer that goes on, and then
    of questions that are not read `counts` tokens; None: all of them."""
    parts = [_next_part(sequence, 0) for sequence in sequences if sequence.decodes]
    for sequence in sequences:
        count = sequence.left if counts is None else counts.get(sequence, 0)
        if count:
            parts.append(_next_part(sequence, count))
    return parts


def _next_part(sequence: S, count: int) -> Part[S]:
    """The next `count` tokens of a question; with 0 the last token of its answer."""
    if count:
        tokens, first = sequence.ids[sequence.read : sequence.read + count], sequence.past + sequence.read
        sequence.read += count
    else:
        tokens, first = [NO_TOKEN], sequence.past + len(sequence.ids) + sequence.asked - 1
    gives, by = sequence.read == len(sequence.ids), GREEDY
    if gives:
        sampling = sequence.sampling
        draw = sequence.draws[sequence.asked] if sampling.temperature > 0 else 0.0
        by = (sampling.temperature, sampling.top_p, draw, sampling.repetition_penalty)
    sequence.asked += gives
    sequence.under_way += 1
    return Part(sequence, tokens, first, by, gives)


def take(sequence: Sequence, token: int, stop_ids: tuple[int, ...]) -> None:
    """Adds a token to a sequence's answer, and ends it by the rules of `generate`.

    Raises: ValueError for NO_TOKEN; what its reader raises.
    """
    if token == NO_TOKEN:
        raise ValueError(
            f"expected logits that are numbers, got NaN for token {sequence.got + 1} of an answer: the model "
            "overflowed, load it in bfloat16 or float32"
        )
    assert sequence.stream is not None
    sequence.got += 1
    sequence.times.append(time.monotonic())
    answer = sequence.stream.add(token, stop_ids)
    if answer is None and sequence.got == sequence.limit:
        answer = sequence.stream.finish("length")
    if answer is not None:
        sequence.answer, sequence.over = answer, True


def end(sequence: Sequence, error: BaseException) -> None:
    """Ends a sequence with an error, unless it is over."""
    if not sequence.over:
        sequence.error, sequence.over = error, True


Wait = Callable[[], list[int]]
"""Waits for a step, and returns the token of each of its parts, or NO_TOKEN."""
