"""A batch: the sequences that run, and the one loop by which steps are launched and tokens taken to their answers."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, runtime_checkable

from .sequences import Part, S, Wait, end, next_parts, take


@runtime_checkable
class Steps(Protocol):
    """What launches a step, as `steps.Runner` does."""

    def run(self, parts: list[Part]) -> Wait:
        """Launches a step over parts of sequences."""
        ...


class Batch(Generic[S]):
    """Sequences that run together.

    `ahead` is how many steps are launched before the oldest is looked at: one on a GPU, so that it never waits for the
    host, and one step is wasted where an answer ends. `changed` are the sequences that got a token or ended; whoever
    looks at them empties it.
    """

    def __init__(self, runner: Steps, stop_ids: tuple[int, ...], *, ahead: int) -> None:
        self.runner, self.stop_ids, self.ahead = runner, stop_ids, ahead
        self.running: list[S] = []
        self.changed: list[S] = []
        self.flight: deque[tuple[list[Part[S]], Wait]] = deque()


def advance(batch: Batch[S], counts: Callable[[], Mapping[S, int]] | None = None) -> bool:
    """Launches the next step and takes the tokens of those that are `ahead` before it. Returns whether any is left.

    An error ends the sequences that it belongs to: one of them, or all of a step.

    Args:
        counts: how many question tokens the step reads; None: all that are left.
    """
    parts = next_parts(batch.running, None if counts is None else counts())
    if parts:
        try:
            batch.flight.append((parts, batch.runner.run(parts)))
        except Exception as error:  # of this step; others may do better
            _lose(batch, parts, error)
    while len(batch.flight) > (batch.ahead if parts else 0):
        _receive(batch, *batch.flight.popleft())
    return bool(batch.flight) or any(sequence.decodes or sequence.left for sequence in batch.running)


def forget(batch: Batch[S]) -> None:
    """Drops all sequences. Steps under way end, and nobody looks at them."""
    batch.running, batch.changed = [], []
    batch.flight.clear()


def _receive(batch: Batch[S], parts: list[Part[S]], wait: Wait) -> None:
    """Takes a step's tokens to their sequences."""
    try:
        tokens = wait()
    except Exception as error:
        _lose(batch, parts, error)
        return
    for part, token in zip(parts, tokens, strict=True):
        sequence = part.sequence
        sequence.under_way -= 1
        if part.gives and not sequence.over:
            try:
                take(sequence, token, batch.stop_ids)
            except Exception as error:
                end(sequence, error)
            batch.changed.append(sequence)


def _lose(batch: Batch[S], parts: list[Part[S]], error: BaseException) -> None:
    for part in parts:
        part.sequence.under_way -= 1
        end(part.sequence, error)
        batch.changed.append(part.sequence)
