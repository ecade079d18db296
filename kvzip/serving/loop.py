"""What the engine's thread does: it admits requests, launches steps, and takes tokens to their requests."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

import torch

from ..decoding import NO_TOKEN
from ..models import Model
from . import handles
from .handles import Handle
from .pages import give_pages_, make_pool, pages_for, take_pages_, write_tail_
from .requests import Request, add_rows
from .scheduler import Reading, Waiting, admit, portions
from .steps import SIZES, Runner, Step
from .store import Held, Limits, Store
from .tables import enter_, leave_, make_tables
from .turns import Turns

logger = logging.getLogger(__name__)


class Loop:
    """The state of an engine, and the work of its thread. Others touch it under the lock `changed`, and notify it.

    `news` says that a waiting request may be able to begin. `ahead` is how many steps are launched before the oldest is
    looked at: one on a GPU, so that it never waits for the host.
    """

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.changed = threading.Condition(threading.RLock())
        self.tables = make_tables(model)
        self.pool = make_pool(model, pages=pages_for(limits.tail_tokens), slots=limits.requests)
        self.runner = Runner(model, self.pool, self.tables)
        self.store = Store(model, limits, self.changed, self._leave)
        self.turns = Turns()
        self.slots = list(range(limits.requests - 1, -1, -1))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.ahead = 1 if model.device.type == "cuda" else 0
        self.flight: deque[tuple[list[tuple[Request, bool]], Callable[[], list[int]]]] = deque()
        self.news = self.closing = self.ended = False
        self.broken: BaseException | None = None
        self._moved = 0
        self._changed: list[Handle] = []  # handles whose readers are to be told

    def run(self) -> None:
        """Works until the engine is closed and all is done."""
        try:
            if self.model.device.type == "cuda":
                torch.cuda.set_device(self.model.device)
            while self._wait_for_work():
                with self.turns.step():
                    self._advance()
        except BaseException as error:  # nothing may leave requests waiting for ever
            logger.exception("the engine failed")
            with self.changed:
                self.broken = error
                for request in [*self.waiting, *self.running]:
                    self._end(request, error)
                self.waiting, self.running = [], []
                self._tell()
        with self.changed:
            self.ended = True
            self.runner.forget_graphs()
            self.changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; False when the engine is closed and all is done."""
        with self.changed:
            self._tidy()
            while not (self.flight or any(r.decodes or r.read < len(r.ids) for r in self.running)):
                if self._admit():
                    break
                if self.closing and not self.waiting and not self.running:
                    return False
                self.turns.set_idle(True)
                self.changed.wait()
                self._tidy()
            else:
                self._admit()
        self.turns.set_idle(False)
        return True

    def _advance(self) -> None:
        """Launches the next step, and looks at those that are `ahead` before it."""
        step, members = self._plan()
        if members:
            try:
                self.flight.append((members, self.runner.run(step)))
            except Exception as error:  # of this step; others may do better
                self._lose(members, error)
        while len(self.flight) > (self.ahead if members else 0):
            self._receive(*self.flight.popleft())
        self._tell()

    def _plan(self) -> tuple[Step, list[tuple[Request, bool]]]:
        """The rows of the next step, and the requests that they belong to, with whether each gets a token."""
        step = Step()
        decoding = [request for request in self.running if request.decodes]
        reading = [
            Reading(request.number, request.key, len(request.ids) - request.read)
            for request in self.running
            if not request.over and request.read < len(request.ids)
        ]
        counts = portions(reading, min(self.limits.portion, SIZES[-1] - len(decoding)))
        members = [(request, add_rows(step, request, 0)) for request in decoding]
        members += [
            (request, add_rows(step, request, counts[request.number]))
            for request in self.running
            if counts.get(request.number)
        ]
        return step, members

    def _receive(self, members: list[tuple[Request, bool]], wait: Callable[[], list[int]]) -> None:
        """Takes a step's tokens to their requests."""
        try:
            tokens = wait()
        except Exception as error:
            self._lose(members, error)
            return
        for (request, gives), token in zip(members, tokens, strict=True):
            request.under_way -= 1
            if gives and not request.over:
                try:
                    self._take(request, token)
                except Exception as error:
                    self._end(request, error)
        self._release()

    def _take(self, request: Request, token: int) -> None:
        if token == NO_TOKEN:
            raise ValueError(
                f"expected logits that are numbers, got NaN for token {request.got + 1} of an answer: the model "
                "overflowed, load it in bfloat16 or float32"
            )
        request.got += 1
        request.handle.times.append(time.monotonic())
        self._changed.append(request.handle)
        answer = request.stream.add(token, self.model.stop_ids)
        if answer is None and request.got == request.limit:
            answer = request.stream.finish("length")
        if answer is not None:
            request.over = True
            handles.finish(request.handle, answer)

    def _lose(self, members: list[tuple[Request, bool]], error: BaseException) -> None:
        for request, _ in members:
            request.under_way -= 1
            self._end(request, error)
        self._release()

    def _end(self, request: Request, error: BaseException) -> None:
        request.over = True
        handles.fail(request.handle, error)
        self._changed.append(request.handle)

    def _tell(self) -> None:
        """Lets readers know what changed, those of a whole step at once."""
        changed, self._changed = self._changed, []
        handles.tell(changed)

    def _tidy(self) -> None:
        """Ends what was cancelled, and drops contexts that are to be removed."""
        for request in [*self.waiting, *self.running]:
            if request.cancelled and not request.over:
                self._end(request, handles.cancelled())
        self.waiting = [request for request in self.waiting if not request.over]
        self._release()
        for held in [x for x in self.store.held if x.removed and not x.moving]:
            if not any(request.context is held for request in [*self.waiting, *self.running]):
                self.store.remove(held)
                self.changed.notify_all()
        self._tell()

    def _release(self) -> None:
        """Takes back slots and pages of requests that are over, once no step that was launched reads them."""
        with self.changed:
            for request in [r for r in self.running if r.over and not r.under_way]:
                self.running.remove(request)
                self.news = True
                give_pages_(self.pool, request.pages)
                self.slots.append(request.slot)
                if request.context is not None:
                    request.context.uses -= 1

    def _admit(self) -> bool:
        """Lets waiting requests begin; whether any did."""
        self.store.new_round()
        if not self.waiting or not (self.news or self._moved != self.store.moved):
            return False
        self.news, self._moved = False, self.store.moved
        ready = {held.number: self.store.want(held) for held in self._wanted_contexts()}
        for request in self.waiting:
            if request.context is not None and request.context.failure is not None:
                self._end(request, request.context.failure)
        for held in self.store.held:
            held.failure = None
        self.waiting = [request for request in self.waiting if not request.over]
        of_each: Counter[int] = Counter()
        listed = []
        for r in self.waiting:
            of_each[r.key] += 1
            if of_each[r.key] <= len(self.slots):  # more of a context cannot begin now
                listed.append(Waiting(r.number, r.key, r.pages_needed, ready.get(r.key, True)))
        counts = Counter(request.key for request in self.running)
        chosen = admit(listed, counts, pages=len(self.pool.free), slots=len(self.slots))
        by_number = {request.number: request for request in self.waiting}
        for number in chosen:
            self._begin(by_number[number])
        begun = set(chosen)
        self.waiting = [request for request in self.waiting if request.number not in begun]
        self._tell()
        return bool(chosen)

    def _wanted_contexts(self) -> list[Held]:
        return list(dict.fromkeys(r.context for r in self.waiting if r.context is not None))

    def _begin(self, request: Request) -> None:
        context = request.context
        request.slot = self.slots.pop()
        request.pages = take_pages_(self.pool, request.slot, request.pages_needed)
        self.running.append(request)
        if context is None:
            return
        context.uses += 1
        try:
            assert context.device is not None
            if context.table is None:
                context.table = enter_(self.tables, context.device)
            if context.device.tail is not None and request.past:
                write_tail_(self.pool, request.pages, context.device.tail, request.past)
        except Exception as error:
            self._end(request, error)

    def _leave(self, held: Held) -> None:
        assert held.table is not None
        leave_(self.tables, *held.table)
        held.table = None
