"""Handles: what `Engine.submit` returns at once, and through which an answer comes."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError

from ..answers import Answer


class Handle:
    """An answer on its way. Any number of threads may read it.

        for piece in engine.submit(context, "Who signed it?"):
            print(piece, end="")

    Iterating gives the answer's pieces of text from the first one on, as they come; `async for` does too. Pieces joined
    are `result().text`. None ends within a character or within what may become a stop text.

    `question_tokens` are the tokens that were read for this request, `context_tokens` those that it found in place.
    """

    def __init__(self, cancel: Callable[["Handle"], None], *, question_tokens: int, context_tokens: int) -> None:
        self.question_tokens, self.context_tokens = question_tokens, context_tokens
        self._cancel = cancel
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._listeners: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        state = "answered" if self._answer else "failed" if self._error else "under way"
        return f"Handle({state}, {self.question_tokens} tokens asked, {len(self._pieces)} pieces)"

    def done(self) -> bool:
        """Whether the answer is complete, failed or cancelled."""
        return self._answer is not None or self._error is not None

    def result(self, timeout: float | None = None) -> Answer:
        """Waits for the whole answer.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises: TimeoutError; concurrent.futures.CancelledError after `cancel`; ValueError for logits that are not
            numbers; what the device raised.
        """
        with self._changed:
            if not self._changed.wait_for(self.done, timeout):
                raise TimeoutError(
                    f"expected an answer within {timeout} s, got {len(self._pieces)} pieces of it so far"
                )
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def cancel(self) -> None:
        """Ends the request, at the latest after the step that runs now. One that is done stays as it is."""
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
        loop, news, at = asyncio.get_running_loop(), asyncio.Event(), 0

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._listeners.append(tell)
        try:
            while True:
                news.clear()
                with self._changed:
                    new, over = self._pieces[at:], self.done()
                for piece in new:
                    yield piece
                at += len(new)
                if over:
                    break
                if not new:
                    await news.wait()
        finally:
            with self._changed:
                self._listeners.remove(tell)
        if self._error is not None:
            raise self._error


def add_piece(handle: Handle, piece: str) -> None:
    """Adds a piece of text. For the engine."""
    with handle._changed:
        handle._pieces.append(piece)
    _tell(handle)


def finish(handle: Handle, answer: Answer) -> None:
    """Ends a handle with its answer, unless it is done. For the engine."""
    with handle._changed:
        if not handle.done():
            handle._answer = answer
    _tell(handle)


def fail(handle: Handle, error: BaseException) -> None:
    """Ends a handle with an error, unless it is done. For the engine."""
    with handle._changed:
        if not handle.done():
            handle._error = error
    _tell(handle)


def cancelled() -> CancelledError:
    """Returns the error of a request that was cancelled."""
    return CancelledError("expected an answer, got none: the request was cancelled")


def _tell(handle: Handle) -> None:
    with handle._changed:
        handle._changed.notify_all()
        listeners = list(handle._listeners)
    for listener in listeners:
        try:
            listener()
        except RuntimeError:  # the loop of a reader that is gone was closed
            continue
