"""Turns on the device: steps, and long work in parts between them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Who may use the device: the engine for one step at a time, or long work for one part at a time.

    After a part, steps have the device for as long as the part took, if there is anything to step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._idle = True  # no step wants a turn
        self._parts = 0  # parts that wait
        self._due = 0.0  # when the next part may run though there are steps

    def set_idle(self, idle: bool) -> None:
        """Says whether the engine has nothing to step."""
        with self._changed:
            self._idle = idle
            self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """The turn of one step."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not (self._parts and time.monotonic() >= self._due))
            self._taken = True
        try:
            yield
        finally:
            self._give()

    @contextmanager
    def parts(self, settle: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
        """Long work. Yields a function to call between its parts, which lets steps run meanwhile.

        Args:
            settle: waits for what was launched.
        """
        begun = self._take_part()

        def pause() -> None:
            nonlocal begun
            settle()
            self._give(after=time.monotonic() - begun)
            begun = self._take_part()

        try:
            yield pause
        finally:
            settle()
            self._give(after=time.monotonic() - begun)

    def _take_part(self) -> float:
        with self._changed:
            self._parts += 1
            try:
                while self._taken or not (self._idle or time.monotonic() >= self._due):
                    self._changed.wait(None if self._taken else max(self._due - time.monotonic(), 0.0))
            finally:
                self._parts -= 1
            self._taken = True
        return time.monotonic()

    def _give(self, after: float = 0.0) -> None:
        with self._changed:
            self._taken = False
            if after:
                self._due = time.monotonic() + after
            self._changed.notify_all()
