"""A document's text to a compressed cache, in parts between the engine's steps."""

from collections.abc import Callable

from .. import compression, options, prefilling, refitting, scoring, streaming
from ..cache import RaggedCache
from ..serving import Engine
from .schemas import DocumentRequest

SEGMENT = (1_000, 4_000)  # context tokens of a part, on a CPU and on a GPU: what answers wait for at a time


class Stopped(Exception):
    """The document is not wanted any more, or the server ends."""


def compress_document(engine: Engine, request: DocumentRequest, progress: Callable[[float], None]) -> RaggedCache:
    """Returns the compressed cache of a document.

    Without bits it is compressed a segment at a time, and its full cache is never held; with bits it is held whole.

    Args:
        progress: called with the fraction that is done, after each part; what it raises ends the work.

    Raises: ValueError for a text that the model cannot take; torch.OutOfMemoryError; what `progress` raises.
    """
    model = engine.model
    options.bits(request.bits, model.config.head_dim)  # now, not after the prefill
    part = SEGMENT[model.device.type == "cuda"]
    chat = model.template is not None
    turn = {"system": request.system, "instruction": request.instruction, "template": chat}
    with engine.long_work() as pause:

        def told(first: float, last: float) -> Callable[[int, int | None], None]:
            def advance(done: int, total: int | None) -> None:
                progress(first + (last - first) * (done / total if total else 0.0))
                pause()

            return advance

        progress(0.0)
        if request.bits is None:
            return streaming.prefill_compressed(
                model,
                request.text,
                request.ratio,
                segment=part,
                chunk=part // 2,
                refit=request.refit,
                share="segment" if request.refit else "running",
                **turn,
                progress=told(0.0, 1.0),
            )
        last = 0.7 if request.refit else 1.0
        dense = prefilling.prefill(model, request.text, chunk=part, **turn, progress=told(0.0, 0.6 * last))
        dense = scoring.score(model, dense, chunk=part // 2, progress=told(0.6 * last, last))
        small = compression.compress(dense, request.ratio, bits=request.bits, consume=not request.refit)
        if request.refit:
            small = refitting.refit(model, dense, small, chunk=part // 2, progress=told(last, 1.0))
        return small
