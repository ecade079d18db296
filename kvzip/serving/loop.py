"""What the engine's thread does: it admits requests, launches steps, and takes tokens to their requests."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..answers import Answer
from ..decoding.batch import Batch, advance
from ..decoding.paged import SIZES, Paged
from ..decoding.pages import give_pages_, make_pool, pages_for, take_pages_, write_tail_
from ..decoding.sequences import end
from ..decoding.steps import Runner
from ..decoding.tables import enter_, leave_, make_tables
from ..models import Model
from ..sources import find_sources
from . import handles
from .handles import Handle
from .limits import Limits
from .requests import Request
from .scheduler import Reading, Waiting, admit, portions
from .store import Held, Store
from .turns import Turns

logger = logging.getLogger(__name__)


class Loop:
    """The state of an engine, and the work of its thread. Others touch it under the lock `changed`, and notify it.

    `news` says that a waiting request may be able to begin, `cancels` that one was cancelled.
    """

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.changed = threading.Condition(threading.RLock())
        self.tables = make_tables(model)
        self.pool = make_pool(model, pages=pages_for(limits.tail_tokens), slots=limits.requests)
        self.runner = Runner(model, Paged(model, self.pool, self.tables), slots=limits.requests + 1)
        self.batch: Batch[Request] = Batch(self.runner, model.stop_ids, ahead=1 if model.device.type == "cuda" else 0)
        self.store = Store(model, limits, self.changed, self._leave)
        self.turns = Turns()
        self.slots = list(range(limits.requests - 1, -1, -1))
        self.waiting: list[Request] = []
        self.news = self.cancels = self.closing = self.ended = False
        self.broken: BaseException | None = None
        self._moved = 0
        self._changed: list[Handle] = []  # handles whose readers are to be told

    def cancel(self, which: Callable[[Request], bool]) -> None:
        """Asks the thread to end those requests. Under the lock, as all from outside."""
        for request in [*self.waiting, *self.running]:
            request.cancelled = request.cancelled or which(request)
        self.cancels = True
        self.changed.notify_all()

    @property
    def running(self) -> list[Request]:
        """The requests that have begun and are not over, or that a step under way still reads."""
        return self.batch.running

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
                self.waiting.clear()
                self.running.clear()
                self._tell()
        self.turns.set_idle(True)
        with self.changed:
            self.ended = True
            self.runner.forget_graphs()
            self.changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; False when the engine is closed and all is done."""
        with self.changed:
            self._tidy()
            while not (self.batch.flight or any(request.decodes or request.left for request in self.running)):
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
        """One step, after which readers hear of what it gave."""
        advance(self.batch, self._portions)
        changed, self.batch.changed = self.batch.changed, []
        for request in changed:
            if request.answer is not None and not request.handle.done():
                self._finish(request, request.answer)
            elif request.error is not None:
                handles.fail(request.handle, request.error)
            self._changed.append(request.handle)
        self._release()
        self._tell()

    def _finish(self, request: Request, answer: Answer) -> None:
        """Gives a request its answer, with its sources if they were asked for: it still holds its context."""
        try:
            if request.sources:
                assert request.context is not None and request.context.device is not None
                cache = request.context.device
                found = find_sources(self.model, cache, request.ids, answer.token_ids, count=request.sources)
                answer = replace(answer, sources=found)
            handles.finish(request.handle, answer)
        except Exception as error:
            handles.fail(request.handle, error)

    def _portions(self) -> dict[Request, int]:
        """How many tokens of which questions the next step reads."""
        decoding = sum(request.decodes for request in self.running)
        reading = {request.number: request for request in self.running if request.left}
        listed = [Reading(number, request.key, request.left) for number, request in reading.items()]
        counts = portions(listed, min(self.limits.portion, SIZES[-1] - decoding), turn=self.runner.steps)
        return {reading[number]: count for number, count in counts.items()}

    def _end(self, request: Request, error: BaseException) -> None:
        end(request, error)
        handles.fail(request.handle, error)
        self._changed.append(request.handle)

    def _tell(self) -> None:
        """Lets readers know what changed, those of a whole step at once."""
        changed, self._changed = self._changed, []
        handles.tell(changed)

    def _tidy(self) -> None:
        """Ends what was cancelled, and drops contexts that are to be removed."""
        if self.cancels:  # looked for only then: thousands may be waiting
            self.cancels = False
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
        self.news = self._end_failed()
        counts = Counter(request.key for request in self.running)
        listed = self._listed(ready)
        chosen = admit(listed, counts, pages=len(self.pool.free), slots=len(self.slots))
        by_number = {request.number: request for request in self.waiting}
        for number in chosen:
            self._begin(by_number[number])
        begun = set(chosen)
        self.waiting = [request for request in self.waiting if request.number not in begun]
        self._tell()
        return bool(chosen) or self.news

    def _end_failed(self) -> bool:
        """Ends requests whose context cannot be brought; whether there were any, so that others may have its place."""
        failed = [r for r in self.waiting if r.context is not None and r.context.failure is not None]
        for request in failed:
            assert request.context is not None and request.context.failure is not None
            self._end(request, request.context.failure)
        for held in self.store.held:
            held.failure = None
        self.waiting = [request for request in self.waiting if not request.over]
        return bool(failed)

    def _listed(self, ready: Mapping[int, bool]) -> list[Waiting]:
        """The waiting requests among which some may begin.

        Those of a context that is in the way of one for which there is no room wait if they came after its first, or
        it might never have its turn.
        """
        of_each: Counter[int] = Counter()
        leaving: set[int] = set()
        listed = []
        for request in self.waiting:
            key, context = request.key, request.context
            if context is not None and not ready[key] and not of_each[key]:
                leaving |= self.store.in_the_way(context)
            of_each[key] += 1
            if key not in leaving and of_each[key] <= len(self.slots):  # more of a context cannot begin now
                listed.append(Waiting(request.number, key, request.pages_needed, ready.get(key, True)))
        return listed

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
            request.place = context.table
            if context.device.tail is not None and request.past:
                write_tail_(self.pool, request.pages, context.device.tail, request.past)
        except Exception as error:
            self._end(request, error)

    def _leave(self, held: Held) -> None:
        assert held.table is not None
        leave_(self.tables, *held.table)
        held.table = None
