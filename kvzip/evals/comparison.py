"""One document, its full cache against a compressed one: answers, changed tokens, probabilities, time and memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import SupportsFloat

import torch
from jaxtyping import Float
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import checks
from ..cache import DenseCache, RaggedCache, check_pairs, nbytes
from ..checks import check_kind, check_texts
from ..display import visible, visible_line
from ..generation import Answer, generate, query_ids
from ..inputs import check_belongs, tokenizer_of
from ..machine import timed
from ..models import Model
from ..options import Refitting, floor_of
from ..prefilling import prefill
from ..prompts import Tokenizer
from ..refitting import refit_and_measure
from .asking import answer_logits
from .methods import METHODS, Method


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
    """The greedy answers to one question from both caches, and how likely both find the full cache's answer.

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
class Fit:
    """What `refit` did: its time, and which part of the repeat's attention each head of the scored layers keeps.

    `before` counts each kept pair once, `after` with its bias.
    """

    seconds: float
    layers: tuple[int, ...]
    before: tuple[tuple[float, ...], ...]
    after: tuple[tuple[float, ...], ...]


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
    fit: Fit | None = None


def compare(
    model: Model,
    document: str,
    questions: str | Sequence[str],
    ratio: SupportsFloat,
    *,
    method: str = "kvzip",
    refit: bool = False,
    floor: SupportsFloat = 0.0,
    instruction: str | None = None,
    template: bool = True,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    available: Mapping[str, Method] = METHODS,
    on_step: Callable[[str], object] | None = None,
) -> Comparison:
    """Returns the answers to one or more questions from the full cache of a document and from the compressed one.

    Each question is asked by itself, after the document alone. Probabilities are those of the full cache's answer when
    it is read by both caches, so that one changed token does not change all that follow it.

    Args:
        ratio: fraction of pairs KEPT, 0 < ratio <= 1.
        method: name in `available` of what scores the pairs.
        refit: fits what is kept by `kvzip.refit`.
        floor: as in `kvzip.compress`; only of a method that does no more than score.
        instruction: opens the user turn, before the document; only with a chat template.
        template: False lets the questions continue the document as plain text.
        stop: a text that ends an answer, or several, as `generate` takes them.
        on_step: called with what is begun, as "reading the document".

    Raises: ValueError for an unknown method, TypeError for questions that are no texts, and what prefill, score,
        compress and generate raise.
    Source: the comparison script of the authors' implementation.
    """
    check_kind(model, Model)
    if not isinstance(method, str) or method not in available:
        raise ValueError(f"expected a method among {sorted(available)}, got {method!r}: pass one of them")
    how, ratio = available[method], checks.kept_ratio(ratio)
    questions, stop = check_texts(questions, "questions"), check_texts(stop, "stop")
    step = on_step or (lambda what: None)
    step("reading the document")
    read = partial(prefill, model, document, instruction=instruction, template=template)
    full, prefill_s = timed(model.device, read)
    step("scoring pairs")
    scored, score_s = timed(model.device, lambda: how.score(model, full))
    least = floor_of(floor)
    small, compress_s = timed(model.device, lambda: how.compressed(model, scored, ratio, floor=least))
    fit = None
    if refit:
        step("fitting what is kept")
        (small, mass), seconds = timed(model.device, lambda: refit_and_measure(model, full, small, Refitting()))
        before, after = (tuple(map(tuple, part.tolist())) for part in (mass.before, mass.after))
        fit = Fit(seconds, full.scored_layers, before, after)

    def answer(cache: DenseCache | RaggedCache, query: str) -> tuple[Answer, float]:
        made = partial(generate, model, cache, query, max_tokens=max_tokens, template=template, stop=stop)
        return timed(model.device, made)

    pairs = []
    for number, query in enumerate(questions, start=1):
        step(f"answering {number} of {len(questions)}")
        (own, full_s), (other, small_s) = answer(full, query), answer(small, query)
        said, ids = (query, own, other, full_s, small_s), own.token_ids
        if not ids:
            pairs.append(AnswerPair(*said, (), None, None, None))
            continue
        p_full, p_small = (answer_probabilities(model, cache, query, ids, template=template) for cache in (full, small))
        pairs.append(AnswerPair(*said, *_moved(tokenizer_of(model), p_full, p_small, ids)))
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
        fit=fit,
    )


def answer_probabilities(
    model: Model, cache: DenseCache | RaggedCache, query: str, answer_ids: Sequence[int], *, template: bool = True
) -> Float[Tensor, "T V"]:
    """Returns float32 probabilities of all tokens of the vocabulary, at the position of each of T answer tokens.

    Question and answer are read in one pass after the cache and its tail; the cache is not changed.

    Raises: ValueError for a cache of another model, an empty query, ids beyond the vocabulary, or more positions than
        the model was made for; TypeError for arguments of another kind.
    """
    check_kind(model, Model)
    check_pairs(cache)
    check_belongs(model, cache)
    if not isinstance(query, str):
        raise TypeError(f"expected query to be one text, got {type(query).__name__}: ask one question at a time")
    asked = query_ids(model, cache, [query], template=template)
    if not isinstance(answer_ids, Iterable) or getattr(answer_ids, "shape", None) == ():
        raise TypeError(f"expected answer_ids to be a list of token ids, got {type(answer_ids).__name__}: pass a list")
    answer = [checks.whole(each, "a token id", least=0) for each in answer_ids]
    return answer_logits(model, cache, asked, [answer])[0].softmax(-1)


def unchanged(comparison: Comparison) -> int:
    """Returns how many questions have the same answer from both caches."""
    return sum(pair.full.text == pair.small.text for pair in comparison.answers)


def render(comparison: Comparison) -> RenderableType:
    """Returns the comparison for a terminal: a line that says it all, sizes and times, then each question.

    No text of the document, the questions or the answers steers the terminal (see `display`).
    """
    c = comparison
    full_mb, small_mb = c.full_bytes / 1e6, c.small_bytes / 1e6
    verdict = f"{unchanged(c)} of {len(c.answers)} answers unchanged; {full_mb:.3g} -> {small_mb:.3g} MB"
    name = visible_line(Path(c.model).name if Path(c.model).is_dir() else c.model)
    about = f"{name}: {c.tokens:,} tokens, {c.method} keeps {c.kept:,} of {c.total:,} pairs ({c.kept / c.total:.1%})"
    sizes = Table("", "full", "compressed", box=None, pad_edge=False)
    sizes.add_row("cache, MB", f"{full_mb:.2f}", f"{small_mb:.2f}")
    sizes.add_row("reading the document, s", f"{c.prefill_s:.2f}", "the same")
    sizes.add_row("scoring and packing, s", "", f"{c.score_s:.2f} + {c.compress_s:.2f}")
    if c.fit is not None:
        sizes.add_row("fitting, s", "", f"{c.fit.seconds:.2f}")
    full_s, small_s = sum(pair.full_s for pair in c.answers), sum(pair.small_s for pair in c.answers)
    sizes.add_row("answering, s", f"{full_s:.2f}", f"{small_s:.2f}")
    legend = (
        "Points are hundredths of a probability, compressed minus full, over the tokens of the full cache's answer: "
        "+5 is from 40% to 45%."
    )
    fit = [] if c.fit is None else ["", _render_fit(c.fit)]
    return Group(Text(verdict, "bold"), Text(about), "", sizes, *fit, *map(_render_pair, c.answers), "", Text(legend))


def _render_fit(fit: Fit) -> Table:
    """The attention that heads keep, a line for each layer."""
    table = Table("layer", "attention kept, by head, %", "with biases, %", box=None, pad_edge=False)
    for layer, before, after in zip(fit.layers, fit.before, fit.after, strict=True):
        table.add_row(str(layer), *(" ".join(f"{100 * x:.0f}" for x in part) for part in (before, after)))
    return table


def _moved(
    tokenizer: Tokenizer, p_full: Float[Tensor, "T V"], p_small: Float[Tensor, "T V"], ids: list[int]
) -> tuple[tuple[Change, ...], Spread, Spread, Spread]:
    """The last four fields of `AnswerPair` for a full cache's answer of these ids."""
    first, second = p_full.argmax(-1), p_small.argmax(-1)
    text = partial(tokenizer.control.decode, skip_special_tokens=False)
    changes = tuple(
        Change(
            position=at,
            full=text([a]),
            small=text([b]),
            full_p=(float(p_full[at, a]), float(p_full[at, b])),
            small_p=(float(p_small[at, a]), float(p_small[at, b])),
        )
        for at, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True))
        if a != b
    )
    own = torch.tensor(ids, device=p_full.device)[:, None]
    apart = (p_small - p_full).gather(1, own), _lead(p_small, first) - _lead(p_full, first), p_small - p_full
    p_answer, margin, p = (Spread(float(x.min()), float(x.abs().mean()), float(x.max())) for x in apart)
    return changes, p_answer, margin, p


def _lead(p: Float[Tensor, "T V"], token: Tensor) -> Float[Tensor, " T"]:
    """How far the probability of a token is above the highest of the others."""
    own = p.gather(1, token[:, None])
    return (own - p.scatter(1, token[:, None], -1.0).amax(-1, keepdim=True))[:, 0]


def _render_pair(pair: AnswerPair) -> Group:
    same = pair.full.text == pair.small.text
    texts = Table(show_header=False)
    texts.add_row("both" if same else "full", Text(visible(pair.full.text)))
    if not same:
        texts.add_row("compressed", Text(visible(pair.small.text)))
    parts: list[RenderableType] = [Text("\n" + visible(pair.query), "bold"), texts]
    spreads = {"p of its tokens": pair.p_answer, "lead over the next": pair.margin, "p of any token": pair.p}
    moved = Table("moved", "lowest, points", "highest, points", "mean size, points", box=None, pad_edge=False)
    for name, spread in spreads.items():
        if spread is not None:
            moved.add_row(name, _points(spread.low), _points(spread.high), _points(spread.mean_abs).removeprefix("+"))
    if moved.row_count:
        parts += ["", moved]
    if pair.changes:
        heads = ("token", "full says", "full, %", "compressed, %", "compressed says", "full, %", "compressed, %")
        changes = Table(*heads, box=None, pad_edge=False)
        for change in pair.changes:
            (own, others), (own_small, others_small) = change.full_p, change.small_p
            first = (_quoted(change.full), f"{own:.1%}"[:-1], f"{own_small:.1%}"[:-1])
            second = (_quoted(change.small), f"{others:.1%}"[:-1], f"{others_small:.1%}"[:-1])
            changes.add_row(str(change.position), *first, *second)
        parts += ["", changes]
    return Group(*parts)


def _points(difference: float) -> str:
    """A difference of probabilities in hundredths, as +22.4; one that rounds to 0 is shown as +<0.1 or -<0.1."""
    points = 100 * difference
    return "0" if not points else f"{'-' if points < 0 else '+'}<0.1" if abs(points) < 0.05 else f"{points:+.1f}"


def _quoted(token: str) -> Text:
    return Text(visible_line(repr(token)))
