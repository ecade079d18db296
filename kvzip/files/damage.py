"""What is wrong with a file: found anywhere while it is read, told in one error that names the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..display import visible_line


class Damaged(Exception):
    """What does not fit together in a file."""


class Refused(Exception):
    """What is wrong with a whole file, in the words of the error that says so."""


def require(condition: bool, reason: str) -> None:
    """Raises Damaged with the reason unless the condition holds."""
    if not condition:
        raise Damaged(reason)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Raises ValueError that names the file for whatever does not fit together within."""
    try:
        yield
    except Refused as error:
        raise ValueError(str(error)) from error.__cause__
    except (Damaged, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, a RuntimeError: no fault of the file
            raise
        raise ValueError(
            f"expected a whole kvzip cache, got {visible_line(path.name)} that is truncated or tampered with "
            f"({visible_line(str(error), limit=300)}): copy it again, or make it again"
        ) from error
