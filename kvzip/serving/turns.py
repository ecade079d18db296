"""Turns on the device: steps, and long work in parts between them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Who may use the device: the engine for one step at a time, or long work for one part at a time.

    After a part, steps have the device for as long as the part took, and for one step at least, if there is anything to
    step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._idle = True  # no step wants a turn
        self._parts = 0  # parts that wait
        self._due = 0.0  # when the next part may run though there are steps
        self._stepped = True  # since the last part

    def set_idle(self, idle: bool) -> None:
        """Says whether the engine has nothing to step."""
        with self._changed:
            self._idle = idle
            self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """The turn of one step."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not (self._parts and self._part_is_due()))
            self._taken = True
        try:
            yield
        finally:
            self._give()

    def _part_is_due(self) -> bool:
        return self._stepped and time.monotonic() >= self._due

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
                while self._taken or not (self._idle or self._part_is_due()):
                    told = self._taken or not self._stepped  # what it waits for, it is told of
                    self._changed.wait(None if told else max(self._due - time.monotonic(), 0.0))
            finally:
                self._parts -= 1
            self._taken = True
        return time.monotonic()

    def _give(self, after: float | None = None) -> None:
        """Ends a turn; `after`: of a part that took so long."""
        with self._changed:
            self._taken, self._stepped = False, after is None
            if after is not None:
                self._due = time.monotonic() + after
            self._changed.notify_all()
