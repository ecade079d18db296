"""A process that torchrun started: it joins the others, and ends when they do, whatever happens to one of them.

A rank that fails says so in the store that torchrun gives them all, and the first that does says why. The others would
wait for it: a thread of theirs looks into the store, and for signals, which the main thread cannot see while it waits
for a GPU or a connection. The main thread then has some seconds to end by itself and to delete what it was writing.
"""

import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .share import Share

GRACE_S = 5.0  # for the main thread to end by itself
_LOOKS_S = 0.25  # between two looks into the store
_PATIENCE_S = 3.0  # of a rank that failed, for the others to look: those that are dead never do
_ENDED = "ended"
GONE = "another rank ended (killed, or out of memory), or torchrun was told to stop: all ranks stop"


class Ended(KeyboardInterrupt):
    """Raised in the main thread when another rank has failed, or torchrun ends all."""


@dataclass(frozen=True)
class Launch:
    """This rank among those of one torchrun. `share` is for what they agree on before there is a model."""

    share: Share
    device: str
    store: Any
    over: threading.Event = field(default_factory=threading.Event)
    claims: list[bool] = field(default_factory=list)  # at most one
    claiming: Any = field(default_factory=threading.Lock)
    ending: Any = field(default_factory=threading.Lock)

    def claim(self) -> bool:
        """Whether this is the first rank to end. If the store is gone with the first rank, the second one speaks."""
        with self.claiming:
            if not self.claims:
                try:
                    self.claims.append(self.store.add(_ENDED, 1) == 1)
                except Exception:
                    self.claims.append(self.share.rank == 1)
            return self.claims[0]

    def fail(self, say: Callable[[], None], code: int) -> NoReturn:
        """Ends this process: `say` is called if no other rank has said why all end. Never returns."""
        self.ending.acquire()  # for good: one thread ends the process
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends one as soon as the first rank is gone
                signal.signal(number, signal.SIG_IGN)
        if self.claim():
            sys.stderr = sys.__stderr__
            say()
            self._let_others_know()
        for stream in (sys.stdout, sys.stderr, sys.__stderr__):
            with suppress(Exception):
                stream.flush()  # pyright: ignore[reportOptionalMemberAccess]
        os._exit(code)  # without destroying the group, which waits for ranks that are gone

    def _let_others_know(self) -> None:
        """Waits until the others have looked, or some seconds: the store may end with this process."""
        until = time.monotonic() + _PATIENCE_S
        with suppress(Exception):
            while self.store.add(_ENDED, 0) < self.share.size and time.monotonic() < until:
                time.sleep(0.02)


def lost(error: BaseException) -> bool:
    """Whether an error only says that a connection to another rank is gone, or that one has failed."""
    return isinstance(error, (Ended, dist.DistBackendError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection"))
    )


def local_device(device: str | None) -> str:
    """Returns the device of this rank: each takes the GPU of its number on the machine.

    Raises: ValueError for a device with a number, or fewer GPUs than ranks.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return kind
    here, found = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    ranks = max(
        here + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )  # so that all of them see it, and the first says it
    if kind != "cuda" or ranks > found:
        raise ValueError(
            f"expected a GPU for each rank (device cpu or cuda), got {kind} and {found} GPUs for {ranks} ranks on this "
            "machine: start as many ranks as there are GPUs"
        )
    return f"cuda:{here}"


@contextmanager
def joined(device: str) -> Iterator[Launch]:
    """Joins the other ranks; within it a failure of one ends all. At the end all wait for each other.

    Graphs and caches must be gone by the end: CUDA graphs hold on to the communicator.
    """
    if device != "cpu":
        torch.cuda.set_device(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    torch_ranks: Any = dist  # whose types do not have all of its names
    store, number, size = next(iter(torch_ranks.rendezvous("env://")))
    prefixed = torch_ranks.PrefixStore
    dist.init_process_group(backend, store=prefixed("group", store), rank=number, world_size=size)
    group, host = torch_ranks.group.WORLD, torch_ranks.new_group(list(range(size)), backend="gloo")
    own = store.clone() if hasattr(store, "clone") else store  # its thread must not wait for the main one
    launch = Launch(Share(number, size, size, group, host), device, prefixed("kvzip", own))
    with _watched(launch):
        yield launch
        dist.barrier(group=host)
    gc.collect()  # graphs in cycles
    if device != "cpu":
        torch.cuda.synchronize(device)
    dist.destroy_process_group()


@contextmanager
def _watched(launch: Launch) -> Iterator[None]:
    """Within it, signals and failures of other ranks end this one."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        raise Ended

    inside, outside = os.pipe()
    os.set_blocking(outside, False)
    before, wakeup = signal.signal(signal.SIGTERM, end), signal.set_wakeup_fd(outside, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(launch, inside), name="kvzip-ranks", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        launch.over.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        watcher.join()
        os.close(inside)
        os.close(outside)


def _watch(launch: Launch, inside: int) -> None:
    while not launch.over.is_set():
        told = b""
        if select.select([inside], [], [], _LOOKS_S)[0]:
            told = os.read(inside, 64)
        if not told and not (_someone_failed(launch) and not launch.claim()):
            continue
        if told and told[-1] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if not told:  # the main thread does not know yet
            signal.raise_signal(signal.SIGTERM)
        if launch.over.wait(GRACE_S):
            return
        interrupted = bool(told) and told[-1] == signal.SIGINT
        text = "interrupted" if interrupted else GONE
        launch.fail(partial(print, f"kvzip: {text}", file=sys.__stderr__), 130 if interrupted else 1)


def _someone_failed(launch: Launch) -> bool:
    try:
        return launch.store.check([_ENDED])
    except Exception:  # gone with the first rank
        return True
