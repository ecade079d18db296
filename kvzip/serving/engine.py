"""The engine: one thread that owns the device and decodes for any number of requests over any number of contexts."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from .. import checks, options, prompts
from ..answers import Stream
from ..cache import DenseCache, RaggedCache
from ..checks import check_kind, check_text_or_ids
from ..decoding.decoder import draws_of
from ..decoding.pages import ROWS, pages_for
from ..inputs import check_whole_model, context_ids, lone_query_ids, query_ids, room_for_answer, tokenizer_of
from ..models import Model
from . import handles, moves
from .handles import Handle
from .limits import limits_of
from .loop import Loop
from .requests import Request
from .store import Held, check_cache_of

_PATIENCE_S = 1.0  # for an engine to end when the program does


class Engine:
    """Answers questions about many contexts at once, each read once a step for all of its readers.

        with kvzip.Engine(model) as engine:
            contract, report = engine.add(cache), engine.add(other)
            answers = [engine.submit(contract, "Who signed it?"), engine.submit(report, "What is new?")]
            print([answer.result().text for answer in answers])

    It starts itself. Requests join and leave between steps; questions are read in portions beside answers that grow.
    Any thread may call any method. On a GPU steps are CUDA graphs; on a CPU the same code runs without them.

    Args:
        memory: bytes of contexts on the model's device; None takes what is free now but for a reserve, so make the
            engine before its caches, or say how much.
        host_memory: bytes of contexts in the host's pinned memory, for those not used lately; None takes half of what
            is free. 0 where the model is on the host itself.
        directory: where contexts go that have no room in either; None: nowhere, `add` then refuses them.
        tail_tokens: tokens of questions and answers of all requests that run; None takes a part of the reserve.
        requests: that run at a time; others wait.
        portion: question tokens of a step. More of them read questions faster, and make answers beside them slower.

    Raises: ValueError for numbers out of range, or a model that ranks share; torch.OutOfMemoryError that says what
        needed the memory.
    """

    def __init__(
        self,
        model: Model,
        *,
        memory: int | None = None,
        host_memory: int | None = None,
        directory: str | Path | None = None,
        tail_tokens: int | None = None,
        requests: int = 256,
        portion: int = 512,
    ) -> None:
        check_kind(model, Model)
        check_whole_model(model, "an engine")  # ranks would step at times of their own
        self.model = model
        self.limits = limits_of(model, memory, host_memory, directory, tail_tokens, requests, portion)
        self._loop = Loop(model, self.limits)
        self._number = 0
        self._thread = threading.Thread(target=self._loop.run, name="kvzip-engine", daemon=True)
        self._thread.start()
        weakref.finalize(self, _abandon, self._loop, self._thread)

    def __repr__(self) -> str:
        with self._loop.changed:
            return (
                f"Engine({len(self._loop.store.held)} contexts, {len(self._loop.running)} requests running, "
                f"{len(self._loop.waiting)} waiting, on {self.model.device})"
            )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    def add(self, cache: DenseCache | RaggedCache | str | Path) -> Held:
        """Takes a context and returns it as `submit` names it.

        The cache's tensors stay where they are, shared with the caller, who drops the cache to let its memory go when
        the context is moved. A cache's own tail, as `ask` leaves one, comes before every question. A file that
        `kvzip.save` wrote is read when it is needed, and never written or deleted; if it is another one by then,
        requests for it fail.

        Raises: ValueError for a cache of another model, or one larger than the memory for contexts; MemoryError if
            there is no place for it beside the others; what `load_cache` raises for a file.
        """
        if isinstance(cache, (str, Path)):
            path = Path(cache)
            given, sums = moves.from_disk(path, self.model, pairs=False)
        else:
            path, given, sums = None, check_cache_of(self.model, cache), None
        with self._loop.changed:
            self.check_open()
            held = self._loop.store.add(given, path, sums)
            self._loop.changed.notify_all()
            return held

    def remove(self, context: Held, *, cancel: bool = False) -> None:
        """Lets a context go, once its requests are answered.

        Args:
            cancel: cancels them instead.

        Raises: ValueError for a context that this engine does not hold.
        """
        with self._loop.changed:
            self.check_open()
            self._check_held(context)
            context.removed = True
            self._loop.cancel(lambda request: cancel and request.context is context)
            self._loop.changed.wait_for(lambda: context not in self._loop.store.held or self._loop.ended)

    @property
    def contexts(self) -> list[Held]:
        """The contexts that it holds."""
        with self._loop.changed:
            return list(self._loop.store.held)

    @property
    def facts(self) -> dict[str, int]:
        """What it does now: requests running and waiting, steps run, pages and bytes in use."""
        with self._loop.changed:
            return {
                "running": len(self._loop.running),
                "waiting": len(self._loop.waiting),
                "steps": self._loop.runner.steps,
                "tail_tokens": ROWS * (self._loop.pool.total - len(self._loop.pool.free)),
                "device_bytes": self._loop.store.on_device,
                "host_bytes": self._loop.store.on_host,
            }

    def submit(
        self,
        context: Held | None,
        query: str | Int64[Tensor, " S"],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        repetition_penalty: float = 1.0,
        template: bool = True,
        sources: int = 0,
    ) -> Handle:
        """Takes a question and returns at once; the answer comes through the handle.

        Args:
            context: what `add` returned, or None for a question without a context.
            query: a text, or the token ids that follow the context's, up to where the answer begins.
            max_tokens, temperature, top_p, seed, stop, repetition_penalty, template, sources: as in `kvzip.generate`.
                A seeded answer does not depend on what else runs.

        Raises: ValueError for a context that this engine does not hold, an empty query, options out of range, a
            question that does not fit in the model's length, or one that with its answer is larger than the room for
            all; RuntimeError for an engine that is closed.
        """
        sampling = options.sampling(max_tokens, temperature, top_p, seed, stop, repetition_penalty)
        named = checks.whole(sources, "sources", least=0)
        if named and context is None:
            raise ValueError("expected a context to name sources of, got none: pass a context, or sources=0")
        for text in sampling.stop:
            prompts.encode_text(tokenizer_of(self.model), text)  # raises for a text that no answer can contain
        check_text_or_ids(query, "query")
        if context is not None:
            with self._loop.changed:
                self._check_held(context)
        ids = self._ids(context, query, template)
        used = len(ids) + (0 if context is None else context.tokens)
        limit = min(sampling.max_tokens, room_for_answer(self.model, used))
        meta = None if context is None else context.meta
        start = 0 if meta is None else meta.context_length
        past = 0 if context is None else context.tokens - start
        pages = pages_for(past + len(ids) + limit)
        if pages > min(self._loop.pool.total, self._loop.pool.table.shape[1]):
            raise ValueError(
                f"expected a question and answer of at most {ROWS * self._loop.pool.total} tokens (the room for all "
                f"requests that run), got {past + len(ids)} and {limit}: lower max_tokens, or give the engine more "
                "tail_tokens="
            )
        draws = draws_of(sampling, limit)
        handle = Handle(self._cancel, question_tokens=len(ids), context_tokens=used - len(ids))
        stream = Stream(tokenizer_of(self.model), sampling.stop, lambda piece, _: handles.add_piece(handle, piece), 0)
        with self._loop.changed:
            self.check_open()
            if context is not None:
                self._check_held(context)
            self._number += 1
            request = Request(
                number=self._number,
                handle=handle,
                context=context,
                ids=ids,
                sampling=sampling,
                draws=draws,
                limit=limit,
                past=past,
                start=start,
                pages_needed=pages,
                stream=stream,
                times=handle.times,
                sources=named,
            )
            self._loop.waiting.append(request)
            self._loop.news = True
            self._loop.changed.notify_all()
        return handle

    @contextmanager
    def long_work(self) -> Iterator[Callable[[], None]]:
        """Lets the caller use the device for work of its own, such as compressing a document, in parts between steps.

            with engine.long_work() as pause:
                dense = kvzip.prefill(model, text, chunk=1_000, progress=lambda done, total: pause())

        `pause()` lets steps run for as long as the part before it took.
        """
        settle: Callable[[], Any] = lambda: None  # noqa: E731
        if self.model.device.type == "cuda":
            settle = lambda: torch.cuda.current_stream(self.model.device).synchronize()  # noqa: E731
        with self._loop.turns.parts(settle) as pause:
            yield pause

    def close(self, *, cancel: bool = False) -> None:
        """Ends the engine: no further requests are taken, and those that it has are answered, or cancelled.

        Closing one that is closed does nothing.
        """
        with self._loop.changed:
            self._loop.closing = True
            self._loop.cancel(lambda request: cancel)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._loop.store.close()

    def _ids(self, context: Held | None, query: str | Tensor, template: bool) -> list[int]:
        if not isinstance(query, str):
            ids = context_ids(self.model, query).tolist()
            if not ids:
                raise ValueError("expected a query of at least one token, got none: ask something")
            return ids
        if context is None:
            return lone_query_ids(self.model, query, template=template)
        return query_ids(self.model, context.meta, [query], template=template)[0]

    def check_open(self) -> None:
        """Raises RuntimeError if the engine takes no requests, because it was closed or failed."""
        if self._loop.broken is not None:
            raise RuntimeError(f"expected an engine that runs, got one that failed ({self._loop.broken}): make another")
        if self._loop.closing:
            raise RuntimeError("expected an engine that is open, got one that was closed: make another")

    def _check_held(self, context: Held) -> None:
        check_kind(context, Held)
        if context.removed or context not in self._loop.store.held:
            raise ValueError("expected a context that this engine holds, got one of another, or one removed: add it")

    def _cancel(self, handle: Handle) -> None:
        with self._loop.changed:
            self._loop.cancel(lambda request: request.handle is handle)


def _abandon(loop: Loop, thread: threading.Thread) -> None:
    """Ends an engine that nobody closed and nobody can ask any more, also where the program ends."""
    with loop.changed:
        loop.closing = True
        loop.cancel(lambda request: True)
    if threading.current_thread() is not thread:
        thread.join(_PATIENCE_S)
