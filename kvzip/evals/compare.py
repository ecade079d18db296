"""One document, its full cache against a compressed one: answers, changed tokens, probabilities, time and memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..attention import decode_attend
from ..cache import DenseCache, RaggedCache, all_ragged, as_ragged, empty_tail, grow_tail, nbytes
from ..compression import compress
from ..generation import Answer, generate, query_ids
from ..models import Model, forward, logits
from ..prefilling import context_ids, prefill, tokenizer_of
from .methods import METHODS, Method

R = TypeVar("R")


@dataclass(frozen=True)
class Change:
    """A token of the full cache's answer that is not the compressed cache's first choice in its place.

    `full` and `small` are the two caches' most likely tokens, after the same tokens of the full cache's answer.
    `full_p` are the full cache's probabilities of the two, `small_p` the compressed cache's.
    """

    position: int
    full: str
    small: str
    full_p: tuple[float, float]
    small_p: tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """The least, the mean absolute and the greatest of some differences, compressed minus full."""

    low: float
    mean_abs: float
    high: float


@dataclass(frozen=True)
class AnswerPair:
    """The greedy answers to one question from both caches, and how the full cache's answer looks to the other.

    Differences are over the tokens of the full cache's answer: `p_answer` of the probability of each, `margin` of the
    lead of the full cache's most likely token over the next, `p` of the probabilities of all tokens of the vocabulary.
    They are None where the answer has no token.
    """

    query: str
    full: Answer
    small: Answer
    full_s: float
    small_s: float
    changes: tuple[Change, ...]
    p_answer: Spread | None
    margin: Spread | None
    p: Spread | None


@dataclass(frozen=True)
class Comparison:
    """What compression did to one document: times in seconds, sizes of the caches in bytes, and pairs of answers."""

    model: str
    method: str
    ratio: float
    tokens: int
    kept: int
    total: int
    prefill_s: float
    score_s: float
    compress_s: float
    full_bytes: int
    small_bytes: int
    answers: tuple[AnswerPair, ...]


def compare(
    model: Model,
    document: str,
    questions: Sequence[str],
    ratio: float,
    *,
    method: str = "kvzip",
    instruction: str | None = None,
    template: bool = True,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    available: Mapping[str, Method] = METHODS,
    on_step: Callable[[str], object] | None = None,
) -> Comparison:
    """Returns the answers to each question from the full cache of a document and from the compressed one.

    Each question is asked by itself, after the document alone. Probabilities are those of the full cache's answer when
    it is read by both caches, so that one changed token does not change all that follow it.

    Args:
        ratio: fraction of pairs KEPT, 0 < ratio <= 1.
        method: name in `available` of what scores the pairs.
        instruction: opens the user turn, before the document; only with a chat template.
        template: False lets the questions continue the document as plain text.
        stop: texts that end an answer, as `generate` takes them.
        on_step: called with what is begun, as "reading the document".

    Raises: ValueError for an unknown method, and what prefill, score, compress and generate raise.
    Source: the comparison script of the authors' implementation.
    """
    if method not in available:
        raise ValueError(f"expected a method among {sorted(available)}, got {method!r}")
    how = available[method]
    step = on_step or (lambda what: None)
    step("reading the document")
    full, prefill_s = _timed(model, lambda: prefill(model, document, instruction=instruction, template=template))
    step("scoring pairs")
    scored, score_s = _timed(model, lambda: how.score(model, full))
    small, compress_s = _timed(model, lambda: compress(scored, ratio, level=how.level))

    def answer(cache: DenseCache | RaggedCache, query: str) -> tuple[Answer, float]:
        return _timed(
            model, lambda: generate(model, cache, query, max_tokens=max_tokens, template=template, stop=tuple(stop))
        )

    pairs = []
    for number, query in enumerate(questions, start=1):
        step(f"answering {number} of {len(questions)}")
        (of_full, full_s), (of_small, small_s) = answer(full, query), answer(small, query)
        pairs.append(_pair(model, full, small, query, of_full, of_small, full_s, small_s, template=template))
    return Comparison(
        model=model.source,
        method=method,
        ratio=ratio,
        tokens=full.length,
        kept=small.kept,
        total=small.total,
        prefill_s=prefill_s,
        score_s=score_s,
        compress_s=compress_s,
        full_bytes=nbytes(full),
        small_bytes=nbytes(small),
        answers=tuple(pairs),
    )


def answer_probabilities(
    model: Model, cache: DenseCache | RaggedCache, query: str, answer_ids: Sequence[int], *, template: bool = True
) -> Float[Tensor, "T V"]:
    """Returns the probabilities of each token of the vocabulary where each of T answer tokens stands, float32.

    The question and the answer are read in one pass after the cache, its tail included, which is left as it was.
    """
    (asked,) = query_ids(model, cache, [query], template=template)
    cache = as_ragged(cache) if isinstance(cache, DenseCache) else cache
    ids = context_ids(model, torch.tensor([*asked, *answer_ids]))[None].to(model.device)
    rows, used = ids.shape[1], len(cache.token_ids)
    if cache.tail is None:
        tail = empty_tail(cache.context, 1, rows, dtype=model.dtype)
    else:
        tail = grow_tail(cache.tail, 1, rows)
    positions = used + torch.arange(rows, device=model.device)
    with torch.no_grad():
        hidden = forward(model, ids, positions, decode_attend(model.config, all_ragged(cache.context), tail))
        return logits(model, hidden[0, len(asked) - 1 : -1]).float().softmax(-1)


def render(comparison: Comparison) -> RenderableType:
    """Returns the comparison as rich's tables: sizes and times, then each question with what changed."""
    c = comparison
    sizes = Table("", "full", f"{c.kept / c.total:.0%} kept", box=None, pad_edge=False)
    sizes.add_row("cache, MB", f"{c.full_bytes / 1e6:.2f}", f"{c.small_bytes / 1e6:.2f}")
    sizes.add_row("reading the document, s", f"{c.prefill_s:.2f}", "")
    sizes.add_row("scoring and packing, s", "", f"{c.score_s:.2f} + {c.compress_s:.2f}")
    answering = [sum(pair.full_s for pair in c.answers), sum(pair.small_s for pair in c.answers)]
    sizes.add_row("answering, s", *(f"{seconds:.2f}" for seconds in answering))
    name = Path(c.model).name if Path(c.model).is_dir() else c.model
    title = f"{name}: {c.tokens:,} tokens, {c.method} keeps {c.kept:,} of {c.total:,} pairs"
    legend = "Differences are compressed minus full over the full cache's answer: least to greatest (mean absolute)."
    return Group(escape(title), "", sizes, *(_render_pair(pair) for pair in c.answers), "", legend)


def _render_pair(pair: AnswerPair) -> Table:
    table = Table(title="\n" + escape(pair.query), title_justify="left", title_style="bold", show_header=False)
    same = pair.full.text == pair.small.text
    table.add_row("both" if same else "full", escape(pair.full.text))
    if not same:
        table.add_row("compressed", escape(pair.small.text))
    spreads = {"p of the answer": pair.p_answer, "margin to the next": pair.margin, "p of any token": pair.p}
    for name, spread in spreads.items():
        if spread is not None:
            table.add_row(name, f"{spread.low:+.4f} to {spread.high:+.4f} ({spread.mean_abs:.1e})")
    for change in pair.changes:
        table.add_row(
            f"token {change.position}",
            escape(
                f"{change.full!r} becomes {change.small!r}: p {change.full_p[0]:.3f} and {change.full_p[1]:.3f} of the "
                f"full cache, {change.small_p[0]:.3f} and {change.small_p[1]:.3f} of the compressed one"
            ),
        )
    return table


def _pair(
    model: Model,
    full: DenseCache,
    small: RaggedCache,
    query: str,
    of_full: Answer,
    of_small: Answer,
    full_s: float,
    small_s: float,
    *,
    template: bool,
) -> AnswerPair:
    ids = of_full.token_ids
    changes: tuple[Change, ...] = ()
    spreads: list[Spread | None] = [None, None, None]
    if ids:
        p_full, p_small = (answer_probabilities(model, cache, query, ids, template=template) for cache in (full, small))
        changes = _changes(model, p_full, p_small)
        chosen = torch.tensor(ids, device=model.device)[:, None]
        apart = [
            (p_small - p_full).gather(1, chosen),
            _lead(p_small, p_full.argmax(-1)) - _lead(p_full, p_full.argmax(-1)),
            p_small - p_full,
        ]
        spreads = [_spread(x) for x in apart]
    return AnswerPair(query, of_full, of_small, full_s, small_s, changes, *spreads)


def _changes(model: Model, p_full: Float[Tensor, "T V"], p_small: Float[Tensor, "T V"]) -> tuple[Change, ...]:
    first, second = p_full.argmax(-1), p_small.argmax(-1)
    tokenizer = tokenizer_of(model)
    return tuple(
        Change(
            position=at,
            full=tokenizer.control.decode([a], skip_special_tokens=False),
            small=tokenizer.control.decode([b], skip_special_tokens=False),
            full_p=(float(p_full[at, a]), float(p_full[at, b])),
            small_p=(float(p_small[at, a]), float(p_small[at, b])),
        )
        for at, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True))
        if a != b
    )


def _lead(p: Float[Tensor, "T V"], token: Tensor) -> Float[Tensor, " T"]:
    """How far the probability of a token is above the highest of the others."""
    own = p.gather(1, token[:, None])
    return (own - p.scatter(1, token[:, None], -1.0).amax(-1, keepdim=True))[:, 0]


def _spread(x: Tensor) -> Spread:
    return Spread(float(x.min()), float(x.abs().mean()), float(x.max()))


def _timed(model: Model, run: Callable[[], R]) -> tuple[R, float]:
    """What `run` returns and the seconds that it took, work queued on the GPU included."""
    start = time.perf_counter()
    result = run()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return result, time.perf_counter() - start
