"""The settings of a streamed prefill, how many pairs they keep, and whether the protected ones fit."""

from dataclasses import asdict, dataclass
from typing import Any

from ..options import Refitting, Scoring


@dataclass(frozen=True)
class Plan:
    """What decides which pairs stay. `prefix`: ids in front of the context; `expected`: its tokens, if known.

    `refitting`: how each segment is fitted before it is packed, None if it is not.
    """

    ratio: float
    segment: int
    share: str
    protect: tuple[tuple[int, int], ...]
    scoring: Scoring
    template: bool
    prefix: tuple[int, ...]
    expected: int | None
    refitting: Refitting | None = None
    floor: float = 0.0

    @property
    def start(self) -> int:
        """Tokens of the prefix."""
        return len(self.prefix)

    def budget(self, heads: int, tokens: int) -> int:
        """How many pairs stay of the first `tokens` context tokens; `heads` counts those of all scored layers."""
        whole = self.expected if self.share == "final" and self.expected is not None else tokens
        return int(self.ratio * (heads * whole))


def note_of(plan: Plan) -> dict[str, Any]:
    """The settings as the note of a checkpoint holds them."""
    spans, scoring = [list(span) for span in plan.protect], asdict(plan.scoring)
    first = {"ratio": plan.ratio, "segment": plan.segment, "share": plan.share, "protect": spans}
    fitted = None if plan.refitting is None else asdict(plan.refitting)
    last = {"prefix": list(plan.prefix), "expected": plan.expected, "refitting": fitted, "floor": plan.floor}
    return {**first, **scoring, "template": plan.template, **last}


def count_protected(plan: Plan, begin: int, stop: int) -> int:
    """How many of the context tokens begin:stop are protected."""
    count, end = 0, begin
    for first, last in sorted(plan.protect):
        first, last = max(first, end), min(last, stop)
        count, end = count + max(0, last - first), max(end, last)
    return count


def check_protected(plan: Plan, heads: int, tokens: int) -> None:
    """Raises ValueError if more is protected than is kept of `tokens` context tokens, or of one segment of them."""
    if plan.share == "segment":
        for begin in range(0, tokens, plan.segment):
            check_share(plan, heads, begin, min(begin + plan.segment, tokens))
    needed, kept = count_protected(plan, 0, tokens), plan.budget(heads, tokens) // heads
    if needed > kept:
        raise ValueError(
            f"expected at most {kept} protected tokens, what ratio {plan.ratio:g} keeps of {tokens}, got {needed}: "
            "raise the ratio or protect less"
        )


def check_share(plan: Plan, heads: int, begin: int, stop: int) -> None:
    """Raises ValueError if more is protected in a segment, context tokens begin:stop, than share "segment" keeps."""
    needed, pairs = count_protected(plan, begin, stop), plan.budget(heads, stop) - plan.budget(heads, begin)
    if needed * heads > pairs:
        raise ValueError(
            f"expected at most {pairs // heads} protected tokens among {begin} to {stop}, the share of that segment, "
            f"got {needed}: take share='running', raise the ratio or protect less"
        )
