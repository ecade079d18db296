"""The work of `kvzip compress`: a document's text to a file, through the full cache or in segments."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import compression, head_scores, inputs, prefilling, scoring, streaming
from ..cache import RaggedCache, save
from ..head_scores import HeadScores
from ..models import Model
from ..options import Budget, Scoring, Turn
from . import limits
from .output import Stage, hint
from .plumbing import resuming
from .targets import check_space, peek, unwritten

PREFILL_CHUNK = (1_000, 16_000)  # tokens at a time on a CPU, which shows progress, and on a GPU


@dataclass(frozen=True)
class Job:
    """A document, what is to be made of it, and where.

    `heads` are scores by which whole heads are kept, and what the other heads keep. `positions` is how many the model
    was made for, None if unknown. `note` is what the file will say of the document.
    """

    text: str
    output: Path
    turn: Turn
    scoring: Scoring
    budget: Budget
    bits: int | None
    segment: int | None
    heads: HeadScores | None
    positions: int | None
    note: dict[str, Any]
    overwrite: bool


def run(stage: Stage, model: Model, job: Job) -> tuple[RaggedCache, dict[str, Any]]:
    """Writes the job's file, and returns the cache and the note that are in it.

    Raises: Stopped after Ctrl-C; ValueError, MemoryError or OSError, before the work, for what there is no room for;
        whatever the library raises.
    """
    begun = time.monotonic()
    prefix, ids = inputs.encode(model, job.text, job.turn)
    with resuming(lambda: left(job.output, job.segment, len(ids))):
        repeated = None if job.heads is not None else job.scoring.chunk
        chat, made_for = job.turn.template, job.positions
        limits.check_length(model, prefix, ids, made_for=made_for, chunk=repeated, chat=chat)
        if job.segment:
            cache, note = _in_segments(stage, model, job, len(prefix), len(ids), begun)
        else:
            cache, note = _at_once(stage, model, job, len(prefix), len(ids), begun)
        stage(f"writing {job.output.name}")
        note = job.note | note
        save(cache, job.output, note=note, model=model, score_bits=8, overwrite=job.overwrite)
    return cache, note


def scores_of(path: Path, model: Model, *, sink: int | None, recent: int | None) -> HeadScores:
    """Returns the head scores of a file, with what the other heads keep in place of what the file says."""
    scores = head_scores.load(path, model=model)
    sink, recent = scores.sink if sink is None else sink, scores.recent if recent is None else recent
    return replace(scores, sink=sink, recent=recent)


def left(output: Path, segment: int | None, tokens: int = 0) -> str:
    """Returns what to say after Ctrl-C: what is left, and how to go on.

    Args:
        tokens: of the document; 0 while that is not known.
    """
    partial = _partial(output)
    if segment is not None and partial.exists():
        return f"what is done is in {partial}: the same command goes on from there"
    useful = limits.segment_for(tokens) if tokens and (segment is None or segment >= tokens) else None
    return unwritten(output) + (f", or with --segment {useful}, which can go on where it stopped" if useful else "")


def _at_once(
    stage: Stage, model: Model, job: Job, start: int, tokens: int, begun: float
) -> tuple[RaggedCache, dict[str, Any]]:
    """The cache compressed by way of the full one, and its part of the note."""
    budget, scores, note = job.budget, job.heads, {}
    if scores is not None and tokens:
        heads, sink, recent = scores.values.numel(), scores.sink, scores.recent
        whole = limits.whole_heads(heads, tokens, budget, sink, recent)
        note = {"heads": {"whole": whole, "heads": heads, "sink": sink, "recent": recent}}
        # the middle between this many heads and one more, so that no rounding makes it one less
        ratio = min(1.0, (whole + 0.5) / heads)
        budget = replace(budget, ratio=ratio, budget=None, level="head", sink=sink, recent=recent)
    full_bytes = prefilling.dense_bytes(model, start + tokens) + 8 * (start + tokens)  # and the ids, as in `nbytes`
    limits.check_memory(model, full_bytes, tokens)
    if budget.ratio is not None:
        packing = 1 if job.bits is None else job.bits / (8 * model.dtype.itemsize)
        check_space(job.output, int(budget.ratio * packing * full_bytes))
    progress = stage("reading the document")
    progress(0, start + tokens)
    step = PREFILL_CHUNK[model.device.type == "cuda"]
    dense = prefilling.prefill(model, job.text, **asdict(job.turn), chunk=step, progress=progress)
    prefilled = time.monotonic()
    if scores is None:
        progress = stage("scoring pairs")
        progress(0, tokens)
        dense = scoring.score(model, dense, **asdict(job.scoring), progress=progress)
    else:
        dense = head_scores.attach(dense, scores)
    scored = time.monotonic()
    stage("dropping the others")
    small = compression.compress(dense, **asdict(budget), bits=job.bits, consume=True)
    packed = time.monotonic()
    return small, note | _seconds(prefill=prefilled - begun, score=scored - prefilled, compress=packed - scored)


def _in_segments(
    stage: Stage, model: Model, job: Job, start: int, tokens: int, begun: float
) -> tuple[RaggedCache, dict[str, Any]]:
    """The compressed cache, made a segment at a time, and its part of the note."""
    assert job.segment is not None and job.budget.ratio is not None  # no other budget goes with --segment
    partial = _partial(job.output)
    check_space(job.output, int(job.budget.ratio * prefilling.dense_bytes(model, start + tokens)))
    done = _done(partial)
    if partial.exists():
        hint(f"going on with {partial}, {done:,} of {tokens:,} tokens are done")
    progress = stage("reading and compressing")
    progress(done, tokens)
    try:
        small = streaming.prefill_compressed(
            model,
            job.text,
            job.budget.ratio,
            segment=job.segment,
            **asdict(job.scoring),
            **asdict(job.turn),
            checkpoint=partial,
            progress=progress,
        )
    except ValueError as error:
        if not partial.exists():
            raise
        raise ValueError(f"{error} (or delete {partial} to begin anew)") from error
    return small, _seconds(compress=time.monotonic() - begun)


def _seconds(**of: float) -> dict[str, Any]:
    return {"seconds": {name: round(value, 3) for name, value in of.items()}}


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _done(partial: Path) -> int:
    """The context tokens that the file of an interrupted run holds, as far as it says."""
    held = peek(partial)
    tokens, start = held.get("tokens"), held.get("start")
    return max(0, tokens - start) if isinstance(tokens, int) and isinstance(start, int) else 0
