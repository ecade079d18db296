"""Contexts in the memory of the device, of the host, and on disk: the least recently used ones make room for others."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ..cache import DenseCache, RaggedCache, as_ragged, check_pairs, nbytes
from ..display import visible_line
from ..inputs import check_belongs
from ..models import Model
from . import moves
from .limits import Limits

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Held:
    """A context that an engine holds. `tokens` are those in place for every question, `nbytes` what it takes."""

    number: int
    tokens: int
    nbytes: int
    meta: RaggedCache = field(repr=False)  # without its layers and tail
    device: RaggedCache | None = field(default=None, repr=False)
    host: RaggedCache | None = field(default=None, repr=False)
    path: Path | None = None
    sums: Mapping[str, str] | None = field(default=None, repr=False)  # of a file that others may write
    owned: bool = field(default=False, repr=False)  # the file is the store's, and goes with the context
    moving: bool = field(default=False, repr=False)
    stuck: bool = field(default=False, repr=False)  # there is no place for it but the device
    failure: BaseException | None = field(default=None, repr=False)  # why it cannot be brought to the device
    uses: int = field(default=0, repr=False)  # requests that run
    used: int = field(default=0, repr=False)  # when it was wanted last
    table: tuple[int, int] | None = field(default=None, repr=False)  # where the device finds it
    removed: bool = field(default=False, repr=False)

    @property
    def chat(self) -> bool:
        """Whether it is the beginning of a chat turn, which `submit(template=True)` goes on with."""
        return self.meta.chat

    @property
    def where(self) -> Literal["device", "host", "disk"]:
        """The fastest memory that holds it: "device", "host" or "disk"."""
        return "device" if self.device is not None else "host" if self.host is not None else "disk"


class Store:
    """Which contexts are where. Every method must be called under the engine's lock.

    All but `add` and `close` are for the engine's thread. Copies are made on a thread and a stream of their own. A
    context may have copies in several memories: contexts never change, so one that came from the host is dropped from
    the device without being copied back.

    Args:
        lock: the engine's.
        leave: called before a context goes from the device, on the engine's thread.
    """

    def __init__(self, model: Model, limits: Limits, lock: threading.Condition, leave: Callable[[Held], None]) -> None:
        self.model, self.limits = model, limits
        self.moved = 0  # how many moves have ended
        self._lock, self._leave = lock, leave
        self._movers = ThreadPoolExecutor(1, thread_name_prefix="kvzip-moves")
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._clock = 0
        self._numbers = 0
        self._wanted: set[int] = set()
        self._arriving = 0  # bytes on their way to the device
        self.held: list[Held] = []

    @property
    def on_device(self) -> int:
        """Bytes of contexts on the device, or on their way to it."""
        return self._arriving + sum(x.nbytes for x in self.held if x.device is not None)

    @property
    def on_host(self) -> int:
        """Bytes of contexts in the host's memory, if the model is elsewhere."""
        return sum(x.nbytes for x in self.held if x.host is not None)

    def add(self, cache: RaggedCache, path: Path | None = None, sums: Mapping[str, str] | None = None) -> Held:
        """Takes a cache, or one without its pairs, the file that they are in, and the checksums of that.

        Raises: ValueError for a cache of another model, or one larger than the memory for contexts; MemoryError if it
            cannot be held beside the others.
        """
        cache = moves.bare(cache)
        size = nbytes(cache)
        if size > self.limits.memory:
            raise ValueError(
                f"expected a context of at most {self.limits.memory:,} bytes (the engine's memory for contexts), got "
                f"one of {size:,}: keep less (ratio, bits=), or give the engine more memory="
            )
        self._numbers += 1
        meta = replace(cache, context=(), tail=None)
        held = Held(self._numbers, len(cache.token_ids), size, meta, path=path, sums=sums)
        if path is None:
            local = cache.device == self.model.device
            held.device, held.host = (cache, None) if local else (None, cache)
            if not self._fits(held):
                raise MemoryError(
                    f"expected room for a context of {size:,} bytes, got {self.on_device:,} of {self.limits.memory:,} "
                    f"bytes in use on the device and {self.on_host:,} of {self.limits.host_memory:,} on the host: "
                    "remove contexts, give more memory= or host_memory=, or a directory= for those that are not in use"
                )
        self.held.append(held)
        self._touch(held)
        return held

    def _fits(self, new: Held) -> bool:
        """Whether there is a place for a context beside the others that cannot go to disk."""
        if self.limits.directory is not None:
            return True
        stuck = sum(x.nbytes for x in self.held if x.path is None)
        return stuck + new.nbytes <= self.limits.memory + self.limits.host_memory

    def new_round(self) -> None:
        """Sends contexts away if there are too many on the device, and forgets which are wanted.

        To be called before `want` is, for waiting requests in their order.
        """
        self._wanted.clear()
        self._make_room(0)

    def want(self, held: Held) -> bool:
        """Whether a request may read a context now; if not, it may as soon as there is room on the device.

        It is not moved away until the next round. If there will never be room, `failure` says why. One that was added
        beyond the budget waits until others have left, unless nothing can.
        """
        self._wanted.add(held.number)
        self._touch(held)
        if held.failure is not None:  # for the requests that wait; others may try again
            return False
        if held.device is not None:
            return held.uses > 0 or self._make_room(0) or not any(x.moving or x.uses for x in self.held)
        if not held.moving and self._make_room(held.nbytes):
            self._start(held, self._bring)
            self._arriving += held.nbytes
        elif not any(x.moving or x.uses for x in self.held) and len(self._wanted) == 1:
            held.failure = MemoryError(
                f"expected room for a context of {held.nbytes:,} bytes, got {self.on_device:,} of "
                f"{self.limits.memory:,} in use by contexts that have nowhere to go: remove some, or give the engine "
                "more host_memory=, or a directory="
            )
        return False

    def in_the_way(self, held: Held) -> set[int]:
        """Returns the contexts that leave, or must leave, before a wanted one has room; none if it is on its way.

        Of those in use, or wanted by requests that came before, that is the ones with the fewest requests.
        """
        if held.device is not None or held.moving:
            return set()
        missing = self.on_device + held.nbytes - self.limits.memory
        leaving = [x for x in self.held if x.device is not None and x.moving]
        missing -= sum(x.nbytes for x in leaving)
        found = {x.number for x in leaving}
        staying = [x for x in self.held if x.device is not None and not x.moving]
        staying = [x for x in staying if x.uses or x.number in self._wanted]
        for each in sorted(staying, key=lambda x: (x.uses, x.used)):
            if missing <= 0:
                break
            found.add(each.number)
            missing -= each.nbytes
        return found

    def remove(self, held: Held) -> None:
        """Drops a context that nothing uses and that is not moving."""
        assert not held.uses and not held.moving
        self._drop(held)
        self.held.remove(held)
        held.host = None
        for other in self.held:
            other.stuck = False  # there may be room now
        _delete(held)

    def close(self) -> None:
        """Waits for moves under way, and deletes the files that the store made. Not under the lock."""
        self._movers.shutdown(wait=True)
        for held in self.held:
            held.device = held.host = None
            _delete(held)

    def _touch(self, held: Held) -> None:
        self._clock += 1
        held.used = self._clock

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes are free on the device; if not, contexts that are not in use begin to go."""
        while True:
            leaving = sum(x.nbytes for x in self.held if x.device is not None and x.moving)
            if self.on_device + size - leaving <= self.limits.memory:
                return self.on_device + size <= self.limits.memory
            idle = [x for x in self.held if x.device is not None and not (x.uses or x.moving or x.stuck)]
            idle = [x for x in idle if x.number not in self._wanted]
            if not idle:
                return False
            oldest = min(idle, key=lambda x: x.used)
            if oldest.host is not None or oldest.path is not None:
                self._drop(oldest)
            else:
                self._start(oldest, self._save_elsewhere)

    def _drop(self, held: Held) -> None:
        if held.table is not None:
            self._leave(held)
        held.device = None

    def _start(self, held: Held, move: Callable[[Held], None]) -> None:
        held.moving = True

        def run() -> None:
            try:
                move(held)
            except Exception as error:  # whatever it is belongs to the requests that wait for the context
                with self._lock:
                    held.stuck, held.failure = held.device is not None, error if held.device is None else None
                logger.warning("context %s could not be moved: %s", held.number, error)
            with self._lock:
                held.moving = False
                self.moved += 1
                self._lock.notify_all()

        self._movers.submit(run)

    # On the movers' thread, where only what concerns one context is read without the lock.

    def _bring(self, held: Held) -> None:
        try:
            source = held.host
            if source is not None:
                cache = moves.to_device(source, self.model.device, self._stream)
            else:
                assert held.path is not None
                with torch.cuda.stream(self._stream):
                    cache, sums = moves.from_disk(held.path, self.model)
                if held.sums not in (None, sums):
                    raise ValueError(
                        f"expected {visible_line(held.path.name)} as it was when it was added, got another file there: "
                        "add it again, or put the old one back"
                    )
                if self._stream is not None:
                    self._stream.synchronize()
        except BaseException:
            with self._lock:
                self._arriving -= held.nbytes
            raise
        with self._lock:  # at once, or it would count twice
            held.device = cache
            self._arriving -= held.nbytes

    def _save_elsewhere(self, held: Held) -> None:
        assert held.device is not None
        if self.limits.host_memory and self._make_host_room(held.nbytes):
            held.host = moves.to_host(held.device, self._stream)
        else:
            self._write(held, held.device)

    def _make_host_room(self, size: int) -> bool:
        """Sends contexts from the host to disk until `size` bytes are free there; False if they cannot go."""
        if size > self.limits.host_memory:
            return False
        while True:
            with self._lock:
                if self.on_host + size <= self.limits.host_memory:
                    return True
                idle = [x for x in self.held if x.host is not None and not x.moving]
                if not idle:
                    return False
                oldest = min(idle, key=lambda x: x.used)
                if oldest.path is not None or oldest.device is not None:  # both under the lock, or it might lose both
                    oldest.host = None
                    continue
                if self.limits.directory is None:
                    return False
                cache = oldest.host
            assert cache is not None
            self._write(oldest, cache)

    def _write(self, held: Held, cache: RaggedCache) -> None:
        if self.limits.directory is None:
            raise MemoryError(
                "expected a place for a context that is not in use, got no room on the host: give the engine more "
                "host_memory=, or a directory="
            )
        self.limits.directory.mkdir(parents=True, exist_ok=True)
        path = self.limits.directory / f"context-{id(self):x}-{held.number}.kvz"
        moves.to_disk(cache, path)
        held.path, held.owned, held.sums = path, True, None


def _delete(held: Held) -> None:
    """Deletes a context's file if the store made it. One that cannot be deleted is no reason for an engine to fail."""
    if held.owned and held.path is not None:
        try:
            held.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", held.path, error)


def check_cache_of(model: Model, cache: DenseCache | RaggedCache) -> RaggedCache:
    """Returns the cache as a ragged one. Raises ValueError if it is not the model's, or has no pairs."""
    check_pairs(cache)
    check_belongs(model, cache)
    return as_ragged(cache)
