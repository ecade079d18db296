"""Requests as they run, and the rows that they add to a step."""

from dataclasses import dataclass, field

from ..answers import Stream
from ..decoding import NO_TOKEN
from ..options import Sampling
from .handles import Handle
from .pages import ROWS
from .steps import Step
from .store import Held


@dataclass(eq=False)
class Request:
    """A question and its answer. `past` is the length of the context's own tail, `start` the position it begins at."""

    number: int
    handle: Handle
    context: Held | None
    ids: list[int]
    sampling: Sampling
    draws: list[float]
    limit: int  # tokens of the answer, at most
    past: int
    start: int
    pages_needed: int
    stream: Stream
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    read: int = 0  # question tokens launched
    asked: int = 0  # answer tokens launched
    got: int = 0  # answer tokens received
    under_way: int = 0  # steps launched that have not been received
    over: bool = False
    cancelled: bool = False

    @property
    def key(self) -> int:
        """What fairness counts by: the context's number, 0 for none."""
        return 0 if self.context is None else self.context.number

    @property
    def decodes(self) -> bool:
        """Whether the next step reads its last token."""
        return not self.over and self.read == len(self.ids) and self.asked < self.limit


def add_rows(step: Step, request: Request, count: int) -> bool:
    """Adds a request's next rows to a step: `count` tokens of its question, or with 0 its last token.

    Returns whether the step gives a token of its answer.
    """
    table, place = (0, -1) if request.context is None else request.context.table or (0, -1)
    if count:
        tokens = request.ids[request.read : request.read + count]
        first = request.past + request.read
        request.read += count
    else:
        tokens = [NO_TOKEN]
        first = request.past + len(request.ids) + request.asked - 1
    sequence = len(step.slots)
    for n, token in enumerate(tokens, start=first):
        number = request.pages[n // ROWS] * ROWS + n % ROWS
        step.rows.append((token, sequence, n + 1, request.start + n, number, table, place))
    step.slots.append(request.slot)
    step.last.append(len(step.rows) - 1)
    gives = request.read == len(request.ids)
    sampling = request.sampling
    if gives and sampling.temperature > 0:
        step.sampling.append((sampling.temperature, sampling.top_p, request.draws[request.asked]))
    else:
        step.sampling.append((0.0, 1.0, 0.0))
    request.asked += gives
    request.under_way += 1
    return gives
