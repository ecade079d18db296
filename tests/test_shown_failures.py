"""What is shown of a process that failed."""

import string

from benchmarks.failures import what_failed


def chatter(start: str) -> list[str]:
    return [f"INFO {start} {letter}" for letter in string.ascii_letters]


def test_the_first_errors_are_shown_once_and_the_end_as_it_is() -> None:
    asserted = [f"x.py:95: block: [{n},0,0], thread: [{n % 32},0,0] Assertion `0 <= i < 9` failed." for n in range(99)]
    traced = ["DEBUG    torch.__trace:utils.py:2126 "] * 500
    end = ["RuntimeError: the last", "1 failed"]
    shown = what_failed("\n".join([*chatter("begins"), *asserted, *traced, *chatter("goes on"), "", *end]), last=10)
    assert shown.splitlines() == ["first errors:", asserted[0] + "  [99 times]", "...", *chatter("goes on")[-8:], *end]


def test_what_is_short_is_shown_whole() -> None:
    assert what_failed("Traceback:\nValueError: this") == "Traceback:\nValueError: this"


def test_a_long_line_is_cut() -> None:
    assert len(what_failed("ValueError: " + "x" * 100_000)) < 1000
