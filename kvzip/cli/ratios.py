"""Ratios as they are typed: numbers, ranges, and dots that go on."""

from collections.abc import Sequence
from fractions import Fraction


def ratios_of(words: Sequence[str]) -> tuple[float, ...]:
    """Returns ratios, each once and ascending, of words such as "0.3", "0.1:0.5:0.1" (a range), or "0.1 ... 1.0".

    The dots go on in the step of the two ratios before them, or in tenths where there is only one.

    Raises: ValueError for a word that is none of these, or a ratio outside (0, 1].
    """
    found: list[Fraction] = []
    dots = False
    for word in words:
        if word in ("...", "\u2026") and found and not dots:
            dots = True
            continue
        try:
            first, last, step = _range(word, found, dots)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"expected ratios such as 0.3, 0.1:0.5:0.1 or 0.1 ... 1.0, got {' '.join(words)!r}"
            ) from error
        found += [first + n * step for n in range(int((last - first) / step) + 1)]
        dots = False
    if dots or not all(0 < ratio <= 1 for ratio in found):
        raise ValueError(
            f"expected ratios in (0, 1], the fraction of pairs that is KEPT, got {' '.join(words)!r}: 0.3 keeps 30%"
        )
    return tuple(sorted({float(ratio) for ratio in found}))


def _range(word: str, before: list[Fraction], dots: bool) -> tuple[Fraction, Fraction, Fraction]:
    """First, last and step of the ratios that a word adds to those before it; in fractions, as 3 * 0.1 is not 0.3."""
    if ":" in word:
        first, last, step = map(Fraction, word.split(":"))
    elif dots:
        step = before[-1] - before[-2] if len(before) > 1 else Fraction(1, 10)
        first, last = before[-1] + step, Fraction(word)
    else:
        first, last, step = Fraction(word), Fraction(word), Fraction(1)
    if step <= 0 or first > last:
        raise ValueError
    return first, last, step
