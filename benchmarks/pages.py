"""Generated parts of written pages."""


def between(text: str, start: str, stop: str, new: str) -> str:
    """The text with what is between two marks replaced. Raises ValueError where they are missing."""
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(stop)
    if not found:
        raise ValueError(f"expected {start} and {stop}, got a page without them: tables go between them")
    return f"{head}{start}\n{new}\n{stop}{tail}"
