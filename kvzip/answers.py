"""Answers, and answers as they grow: ids become text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from . import prompts
from .sources import Source


@dataclass(frozen=True)
class Answer:
    """An answer, without the stop token or stop text that ended it.

    `token_ids` decode to `text`; if a stop text begins within the last token, they decode to `text` and the part of the
    stop text in that token. `stopped` is "stop" for a stop token or text, "length" for max_tokens or the model's last
    position. `sources` are the passages of the context that the answer attended to most, where they were asked for.
    """

    text: str
    token_ids: list[int]
    stopped: Literal["stop", "length"]
    sources: tuple[Source, ...] = ()


@dataclass
class Stream:
    """One answer as it grows: ids become text, held back while a stop text or a character is incomplete."""

    tokenizer: prompts.Tokenizer
    stops: tuple[str, ...]
    emit: Callable[[str, int], None] | None
    index: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    window: int = 0  # ids[window:read] are decoded again with each new id, to place spaces right
    read: int = 0

    def add(self, token: int, stop_ids: tuple[int, ...]) -> Answer | None:
        """Takes one token; returns the answer if it ends it."""
        if token in stop_ids:
            return self.finish("stop")
        self.ids.append(token)
        return self._read(final=False)

    def finish(self, reason: Literal["stop", "length"]) -> Answer:
        """Ends the answer, with the text that was held back."""
        stopped = self._read(final=True)
        self._send(len(self.text))
        return stopped or Answer(self.text, self.ids, reason)

    def _read(self, *, final: bool) -> Answer | None:
        """Decodes the new ids and sends the text; returns the answer if a stop text ends it."""
        before = prompts.decode(self.tokenizer, self.ids[self.window : self.read])
        now = prompts.decode(self.tokenizer, self.ids[self.window :])
        if len(now) > len(before) and (final or not now.endswith("\ufffd")):
            self.text += now[len(before) :]
            self.window, self.read = self.read, len(self.ids)
        found = [at for at in (self.text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self._send(len(self.text))
            while self.ids and prompts.decode(self.tokenizer, self.ids[:-1]).startswith(self.text):
                self.ids.pop()
            return Answer(self.text, self.ids, "stop")
        held = max((_begun(stop, self.text) for stop in self.stops), default=0)
        self._send(len(self.text) - held)
        return None

    def _send(self, upto: int) -> None:
        if self.emit is not None and upto > self.sent:
            self.emit(self.text[self.sent : upto], self.index)
        self.sent = max(self.sent, upto)


def _begun(stop: str, text: str) -> int:
    """How many characters of a stop text, not all, the text ends with."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
