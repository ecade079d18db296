"""Handles: what `Engine.submit` returns at once, and through which an answer comes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import SupportsFloat

from ..answers import Answer


class Handle:
    """An answer on its way. Any number of threads may read it.

        for piece in engine.submit(context, "Who signed it?"):
            print(piece, end="")

    Iterating gives the answer's pieces of text from the first one on, as they come; `async for` does too, and joins
    those that came while its reader was busy. Pieces joined are `result().text`. None ends within a character or within
    what may become a stop text.

    `question_tokens` are the tokens that were read for this request, `context_tokens` those that it found in place.
    `begun` is when it was made, `times` are those of the answer's tokens so far (`time.monotonic()`, seconds).
    """

    def __init__(self, cancel: Callable[["Handle"], None], *, question_tokens: int, context_tokens: int) -> None:
        self.question_tokens, self.context_tokens = question_tokens, context_tokens
        self.begun = time.monotonic()
        self.times: list[float] = []
        self._cancel = cancel
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def __repr__(self) -> str:
        state = "answered" if self._answer else "failed" if self._error else "under way"
        return f"Handle({state}, {self.question_tokens} tokens asked, {len(self._pieces)} pieces)"

    def done(self) -> bool:
        """Whether the answer is complete, failed or cancelled."""
        return self._answer is not None or self._error is not None

    def result(self, timeout: SupportsFloat | None = None) -> Answer:
        """Waits for the whole answer.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises: TimeoutError; concurrent.futures.CancelledError after `cancel`; ValueError for logits that are not
            numbers; what the device raised.
        """
        with self._changed:
            if not self._changed.wait_for(self.done, None if timeout is None else float(timeout)):
                raise TimeoutError(
                    f"expected an answer within {timeout} s, got {len(self._pieces)} pieces of it so far"
                )
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def cancel(self) -> None:
        """Ends the request, at the latest after the step that runs now. One that is done stays as it is."""
        if not self.done():
            self._cancel(self)

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda at=at: len(self._pieces) > at or self.done())
                new = self._pieces[at:]
            if not new:
                break
            yield from new
            at += len(new)
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[str]:
        news, at = asyncio.Event(), 0
        listener = (asyncio.get_running_loop(), news)
        with self._changed:
            self._listeners.append(listener)
        try:
            while True:
                news.clear()
                with self._changed:
                    new, over = self._pieces[at:], self.done()
                if new:
                    yield "".join(new)
                at += len(new)
                if over:
                    break
                if not new:
                    await news.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)
        if self._error is not None:
            raise self._error


def add_piece(handle: Handle, piece: str) -> None:
    """Adds a piece of text. For the engine, as all below; asynchronous readers hear of it by `tell`."""
    with handle._changed:
        handle._pieces.append(piece)
        handle._changed.notify_all()


def finish(handle: Handle, answer: Answer) -> None:
    """Ends a handle with its answer, unless it is done."""
    with handle._changed:
        if not handle.done():
            handle._answer = answer
        handle._changed.notify_all()


def fail(handle: Handle, error: BaseException) -> None:
    """Ends a handle with an error, unless it is done."""
    with handle._changed:
        if not handle.done():
            handle._error = error
        handle._changed.notify_all()


def tell(changed: Iterable[Handle]) -> None:
    """Wakes the asynchronous readers of handles that changed: each event loop once, however many readers it has.

    A wake-up costs a system call, in which another thread may take Python's lock.
    """
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for handle in changed:
        with handle._changed:
            for loop, news in handle._listeners:
                waiting.setdefault(loop, []).append(news)
    for loop, events in waiting.items():
        with suppress(RuntimeError):  # the loop of readers that are gone was closed
            loop.call_soon_threadsafe(_set, events)


def cancelled() -> CancelledError:
    """Returns the error of a request that was cancelled."""
    return CancelledError("expected an answer, got none: the request was cancelled")


def _set(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
