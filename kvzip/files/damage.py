"""Errors about a damaged file: raised anywhere while it is read, reported as one ValueError that names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..display import visible_line


class Damaged(Exception):
    """Parts of a file do not fit together; the text says which."""


class Refused(Exception):
    """A file cannot be read at all; the text is the whole message of the error."""


def require(condition: bool, reason: str) -> None:
    """Raises Damaged with the reason unless the condition holds."""
    if not condition:
        raise Damaged(reason)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns errors within that the file's content causes into a ValueError that names the file."""
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
