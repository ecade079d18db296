"""Code as users run it: without the checks of types and shapes that tests add."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import pytest


@contextmanager
def unchecked() -> Iterator[None]:
    """Turns the checks off, also as a decorator of a test: in many small steps they take most of the time.

    For arguments that the checks would refuse before our own errors do, and for facts about values of long answers.
    Shorter tests of the same functions are checked.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield
