"""Documents: files in a directory, those that are being compressed, and their contexts in the engine.

A document that was accepted is on disk before the client hears of it: its text and options as `<id>.json`, until
`<id>.kvz` has taken its place. So a server that is killed finds all of them again, and goes on with those that were not
done. Ids are the server's own; what a client calls a document is never part of a path.
"""

import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ..cache import read_header, save
from ..files.schema import entry
from ..files.writing import whole_file
from ..serving import Engine, Held
from .errors import ApiError
from .schemas import Document, DocumentRequest
from .work import Stopped, compress_document

logger = logging.getLogger(__name__)

SUFFIX, WAITS = ".kvz", ".json"
MOST_WAITING = 1_000  # documents that are not compressed yet; more are refused
_OURS = re.compile(r"doc-[0-9a-f]{16}")  # ids of documents that were posted
_LEFT = re.compile(rf"\.{_OURS.pattern}\.(kvz|json)\.[0-9a-f]{{12}}\.partial")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")


@dataclass(frozen=True)
class Entry:
    """A document. `context` once it is ready, `error` if it failed; `ours`: its files are the server's to delete.

    `created` are seconds since 1970, with their fractions, by which documents have an order.
    """

    id: str
    title: str
    created: float
    path: Path
    ours: bool
    context: Held | None = None
    done: float = 0.0
    working: bool = False
    error: str | None = None


class Library:
    """The documents of a server. Any thread may call it.

    Args:
        directory: of documents that clients post, made if it is not there. What is in it is found again; files that
            are not named as a server names them are never written or deleted.
        files: further documents, by their files' stems.

    Raises: ValueError for a file that is no cache of the model, two files of one stem, or a directory that another
        server has, or that cannot be made; OSError.
    """

    def __init__(self, engine: Engine, directory: Path, files: Iterable[Path] = ()) -> None:
        self._engine, self._directory = engine, directory
        self._lock = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._closing = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"expected a directory for documents, or a place for one, got {directory} ({error.strerror}): name "
                "another one (--documents)"
            ) from error
        self._own = _own_directory(directory)
        for path in directory.iterdir():
            if _LEFT.fullmatch(path.name):  # by a server that was killed while it wrote
                path.unlink(missing_ok=True)
        for path in files:
            if path.stem in self._entries:
                raise ValueError(f"expected files of different names, got two called {path.stem}: rename one")
            if not _ID.fullmatch(path.stem):
                raise ValueError(
                    f"expected a file named with letters, digits and ._- alone, got {path.name!r}: rename it"
                )
            self._entries[path.stem] = self._opened(path, ours=False)
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            if path.stem not in self._entries and _ID.fullmatch(path.stem):
                try:
                    self._entries[path.stem] = self._opened(path, ours=bool(_OURS.fullmatch(path.stem)))
                except (ValueError, OSError) as error:
                    logger.warning("%s is left out: %s", path.name, error)
        for path in sorted(directory.glob(f"*{WAITS}")):
            if _OURS.fullmatch(path.stem):
                self._find_waiting(path)
        self._worker = threading.Thread(target=self._work, name="kvzip-documents", daemon=True)
        self._worker.start()

    def all(self) -> list[Document]:
        """Every document, oldest first."""
        with self._lock:
            entries = sorted(self._entries.values(), key=lambda x: (x.created, x.id))
        return [_described(each) for each in entries]

    def get(self, name: str) -> Document | None:
        """A document by its id."""
        with self._lock:
            found = self._entries.get(name)
        return None if found is None else _described(found)

    def context(self, name: str) -> Held | None:
        """The context of a document that is ready."""
        with self._lock:
            found = self._entries.get(name)
        return None if found is None else found.context

    def post(self, request: DocumentRequest) -> Document:
        """Accepts a document. Raises ApiError if too many wait; OSError if it cannot be written down."""
        with self._lock:
            waiting = sum(each.context is None and each.error is None for each in self._entries.values())
        if waiting >= MOST_WAITING:
            raise ApiError(429, f"expected fewer than {MOST_WAITING} documents that wait, got {waiting}: post it later")
        name = f"doc-{secrets.token_hex(8)}"
        created, path = time.time(), self._directory / f"{name}{SUFFIX}"
        asked = request.model_dump() | {"created": created}
        with whole_file(path.with_suffix(WAITS), overwrite=False) as written:
            written.write_text(json.dumps(asked), encoding="utf-8")
        added = Entry(name, request.title or name, created, path, ours=True)
        with self._lock:
            self._entries[name] = added
            self._lock.notify_all()
        return _described(added)

    def delete(self, name: str) -> bool:
        """Takes a document out, once its requests are answered; its files go if they are the server's. False if there
        is none."""
        with self._lock:
            found = self._entries.pop(name, None)
        if found is None:
            return False
        if found.context is not None:
            self._engine.remove(found.context)
        if found.ours:
            found.path.with_suffix(WAITS).unlink(missing_ok=True)
            found.path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Stops compressing; what is not done is found again."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._worker.join()
        self._own.close()

    def _opened(self, path: Path, *, ours: bool) -> Entry:
        note = entry(read_header(path), "note")
        created, title = note.get("created"), note.get("title")
        created = created if isinstance(created, (int, float)) else path.stat().st_mtime
        title = title if isinstance(title, str) else path.stem
        return Entry(path.stem, title, created, path, ours, self._engine.add(path), 1.0)

    def _find_waiting(self, path: Path) -> None:
        """A document that a server before this one accepted."""
        if path.stem in self._entries:  # killed between the two steps of finishing it
            path.unlink(missing_ok=True)
            return
        try:
            asked = json.loads(path.read_text(encoding="utf-8"))
            title, created, error = asked.get("title"), float(asked["created"]), asked.get("error")
            if not isinstance(title, str | None) or not isinstance(error, str | None) or not math.isfinite(created):
                raise ValueError("expected a document that a server accepted, got something else")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            logger.warning("%s is left out: %s", path.name, problem)
            return
        target = path.with_suffix(SUFFIX)
        self._entries[path.stem] = Entry(path.stem, title or path.stem, created, target, ours=True, error=error)

    def _work(self) -> None:
        """Compresses one document after the other, on a thread of its own."""
        while True:
            with self._lock:
                waiting = self._next()
                while waiting is None and not self._closing:
                    self._lock.wait()
                    waiting = self._next()
                if self._closing or waiting is None:
                    return
                self._entries[waiting.id] = replace(waiting, working=True)
            try:
                self._compress(waiting)
            except Stopped:
                continue
            except Exception as error:  # of one document; others may do better
                logger.warning("document %s failed: %s", waiting.id, error)
                self._fail(waiting, error)

    def _next(self) -> Entry | None:
        waiting = [x for x in self._entries.values() if x.context is None and x.error is None]
        return min(waiting, key=lambda x: (x.created, x.id), default=None)

    def _compress(self, waiting: Entry) -> None:
        path = waiting.path.with_suffix(WAITS)
        asked: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        request = DocumentRequest(**{name: asked[name] for name in DocumentRequest.model_fields if name in asked})

        def progress(share: float) -> None:
            with self._lock:
                found = self._entries.get(waiting.id)
                if found is None or self._closing:
                    raise Stopped
                self._entries[waiting.id] = replace(found, done=share)

        cache = compress_document(self._engine, request, progress)
        note = {"title": waiting.title, "created": waiting.created, "characters": len(request.text)}
        save(cache, waiting.path, note=note, model=self._engine.model, score_bits=8, overwrite=True)
        del cache
        with self._lock:
            if waiting.id not in self._entries:  # deleted meanwhile
                waiting.path.unlink(missing_ok=True)
                return
            context = self._engine.add(waiting.path)
            path.unlink(missing_ok=True)
            self._entries[waiting.id] = replace(waiting, context=context, done=1.0, working=False)

    def _fail(self, waiting: Entry, error: Exception) -> None:
        text = str(error) or type(error).__name__
        asked = {"title": waiting.title, "created": waiting.created, "error": text}
        path = waiting.path.with_suffix(WAITS)
        try:
            waiting.path.unlink(missing_ok=True)
            with whole_file(path) as written:
                written.write_text(json.dumps(asked), encoding="utf-8")
        except OSError as problem:  # it is tried again after a restart
            logger.warning("document %s: why it failed is not written down: %s", waiting.id, problem)
        with self._lock:
            if waiting.id in self._entries:
                self._entries[waiting.id] = replace(waiting, error=text, working=False)
                return
        with suppress(OSError):  # as where it could not be written
            path.unlink(missing_ok=True)  # it was deleted meanwhile


def _own_directory(directory: Path) -> IO[bytes]:
    """Returns a file that this process alone holds locked, for as long as it is open.

    Raises: ValueError if another server has the directory. On Windows nothing is checked.
    """
    held = (directory / ".lock").open("ab")
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held.close()
            raise ValueError(
                f"expected a directory of documents of its own, got {directory}, which another server has: name "
                "another one (--documents)"
            ) from error
    return held


def _described(found: Entry) -> Document:
    context = found.context
    failed = "failed" if found.error else "compressing" if found.working else "queued"
    return Document(
        id=found.id,
        status="ready" if context is not None else failed,
        progress=1.0 if context is not None else min(found.done, 1.0),
        title=found.title,
        created=int(found.created),
        tokens=None if context is None else context.tokens,
        bytes=None if context is None else context.nbytes,
        where=None if context is None else context.where,
        error=found.error,
    )
