"""Numbers that callers give: Python's, numpy's, fractions, decimals or tensors without axes, checked at the door."""

import math
import numbers
import operator
import reprlib
from decimal import Decimal
from typing import Any


def whole(value: Any, name: str, *, least: int | None = None) -> int:
    """Returns a whole number of any type as a Python int.

    Raises: TypeError for what is no whole number, 3.0, "3" and True among it; ValueError for less than `least`.
    """
    bound = "" if least is None else f" of {least} or more"
    try:
        found = operator.index(_plain(value))
    except TypeError:
        shown = reprlib.repr(value)
        raise TypeError(f"expected {name} to be a whole number, got {shown}: pass an int{bound}") from None
    if least is not None and found < least:
        raise ValueError(f"expected {name} to be at least {least}, got {found}: pass an int{bound}")
    return found


def number(value: Any, name: str, *, finite: bool = True) -> float:
    """Returns a number of any type as the Python float nearest to it.

    Raises: TypeError for what is no number, "0.3" and True among it; ValueError for NaN and infinities if `finite`.
    """
    plain = _plain(value)
    if not isinstance(plain, (numbers.Real, Decimal)):
        raise TypeError(f"expected {name} to be a number, got {reprlib.repr(value)}: pass a float")
    try:
        found = float(plain)
    except ValueError:  # a signaling NaN
        found = math.nan
    except OverflowError:  # an int or a fraction beyond float64
        found = math.inf if operator.gt(plain, 0) else -math.inf
    if finite and not math.isfinite(found):
        shown = "NaN" if math.isnan(found) else found
        raise ValueError(f"expected a {name} that is a number, got {shown}: pass a finite one")
    return found


def kept_ratio(value: Any, *, of: str = "pairs") -> float:
    """Returns a ratio of any type as a Python float, so that int(ratio * total) is the float64 product for all of them.

    A float32 of 0.3 is 0.30000001192092896 then, a Fraction the float64 nearest to it.

    Raises: TypeError for what is no number; ValueError unless 0 < ratio <= 1.
    """
    found = number(value, "ratio", finite=False)
    if not 0 < found <= 1:
        shown = repr(found).removesuffix(".0")
        example = f"{found / 100:g} keeps {shown}%" if 1 < found <= 100 else "0.3 keeps 30%"
        raise ValueError(f"expected 0 < ratio <= 1, the fraction of {of} that is KEPT, got {shown}: {example}")
    return found


def _plain(value: Any) -> Any:
    """The number in a scalar of numpy or a tensor without axes; None, which is no number, for bools and arrays."""
    if hasattr(value, "shape"):
        try:
            value = value.item() if value.shape == () else None
        except RuntimeError:  # a tensor whose value is not there
            return None
    return None if isinstance(value, bool) else value
