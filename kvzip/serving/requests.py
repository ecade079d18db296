"""Requests: sequences that somebody waits for, over a context that an engine holds."""

from dataclasses import dataclass

from ..decoding.sequences import Sequence
from .handles import Handle
from .store import Held


@dataclass(eq=False, kw_only=True)
class Request(Sequence):
    """A question that was submitted, and its answer."""

    number: int
    handle: Handle
    context: Held | None
    pages_needed: int
    sources: int = 0
    cancelled: bool = False

    @property
    def key(self) -> int:
        """What fairness counts by: the context's number, 0 for none."""
        return 0 if self.context is None else self.context.number
