"""How much of each segment stays, and whether what is protected fits in it."""


def count_protected(spans: list[tuple[int, int]], start: int, stop: int) -> int:
    """How many of the context tokens start:stop are protected."""
    inside = sorted((max(a, start), min(b, stop)) for a, b in spans)
    count, end = 0, start
    for a, b in inside:
        count += max(0, b - max(a, end))
        end = max(end, b)
    return count


def check_protected(
    spans: list[tuple[int, int]], tokens: int, *, heads: int, ratio: float, segment: int, share: str
) -> None:
    """Raises ValueError if more is protected than stays of a context of so many tokens, in `heads` of all layers."""
    if share == "segment":
        for start in range(0, tokens, segment):
            stop = min(start + segment, tokens)
            check_share(spans, start, stop, int(ratio * (heads * stop)) - int(ratio * (heads * start)), heads=heads)
    needed, kept = count_protected(spans, 0, tokens), int(ratio * (heads * tokens)) // heads
    if needed > kept:
        raise ValueError(
            f"expected at most {kept} protected tokens, what ratio {ratio:g} keeps of {tokens}, got {needed}: raise "
            "the ratio or protect less"
        )


def check_share(spans: list[tuple[int, int]], start: int, stop: int, pairs: int, *, heads: int) -> None:
    needed = count_protected(spans, start, stop)
    if needed * heads > pairs:
        raise ValueError(
            f"expected at most {pairs // heads} protected tokens among {start} to {stop}, the share of that segment, "
            f"got {needed}: take share='running', raise the ratio or protect less"
        )
