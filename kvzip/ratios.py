"""The check of a ratio. It does not import torch, so that the command line can check before loading it."""

FLOOR = 0.2
"""The part of an equal share that every head keeps at least of what is fitted: see docs/refitting.md."""


def check_ratio(ratio: float, *, got: str | None = None, of: str = "pairs") -> float:
    """Returns a ratio as it is.

    Args:
        got: what was given, as the error shows it; None shows the ratio.
        of: what the ratio is a fraction of.

    Raises: ValueError unless 0 < ratio <= 1, which NaN is not.
    """
    if 0 < ratio <= 1:
        return ratio
    shown = repr(ratio).removesuffix(".0")
    example = f"{ratio / 100:g} keeps {shown}%" if 1 < ratio <= 100 else "0.3 keeps 30%"
    raise ValueError(f"expected 0 < ratio <= 1, the fraction of {of} that is KEPT, got {got or shown}: {example}")
