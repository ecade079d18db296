"""Who comes next: which waiting requests begin, and how many tokens of which questions a step reads.

Data in, data out: nothing here knows of a model, a device or a thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

QUANTUM = 64  # question tokens that a context's turn takes; a multiple of what attention reads at a time


@dataclass(frozen=True)
class Waiting:
    """A request that has not begun. `ready`: its context is where the device can read it."""

    request: int
    context: int
    pages: int
    ready: bool = True


@dataclass(frozen=True)
class Reading:
    """A request that has begun, with `left` tokens of its question still to be read."""

    request: int
    context: int
    left: int


def admit(waiting: Sequence[Waiting], running: Mapping[int, int], *, pages: int, slots: int) -> list[int]:
    """Returns the requests that begin now, in their order.

    The next one is always of the context with the fewest running requests, and of these the one that came first, so
    that a context with a thousand readers does not keep another one's only reader waiting. A request for which there
    are too few pages is not overtaken, except past those whose context is on its way: it would never have its turn.

    Args:
        waiting: in order of arrival.
        running: how many requests of each context run already.
        pages: that are free.
        slots: requests that may begin at most.
    """
    counts, queues = dict(running), _by_context([each for each in waiting if each.ready])
    arrival = {each.request: n for n, each in enumerate(waiting)}
    chosen: list[int] = []
    while queues and len(chosen) < slots:
        context = min(queues, key=lambda c: (counts.get(c, 0), arrival[queues[c][0].request]))
        first = queues[context][0]
        if first.pages > pages:
            break
        chosen.append(first.request)
        pages -= first.pages
        counts[context] = counts.get(context, 0) + 1
        if len(queues[context]) == 1:
            del queues[context]
        else:
            queues[context] = queues[context][1:]
    return chosen


def portions(reading: Sequence[Reading], room: int, *, turn: int = 0) -> dict[int, int]:
    """Returns how many tokens of which questions a step reads, `room` at most.

    Contexts take turns of QUANTUM tokens, each for its request that came first, so that a long question neither waits
    for nor holds up those of other contexts.

    Args:
        reading: in order of arrival.
        turn: of the step: which context begins. Where there is no room for all, none is always left out.
    """
    queues = _by_context(reading)
    order = list(queues)
    begin = turn % max(1, len(order))
    queues = {context: queues[context] for context in (*order[begin:], *order[:begin])}
    left = {each.request: each.left for each in reading}
    found: dict[int, int] = {}
    while queues and room > 0:
        for context in list(queues):
            request = queues[context][0].request
            count = min(QUANTUM, left[request], room)
            if count:
                found[request] = found.get(request, 0) + count
            left[request] -= count
            room -= count
            if left[request] == 0:
                queues[context] = queues[context][1:]
                if not queues[context]:
                    del queues[context]
            if room == 0:
                break
    return found


def _by_context(each: Sequence) -> dict[int, list]:
    queues: dict[int, list] = {}
    for one in each:
        queues.setdefault(one.context, []).append(one)
    return queues
