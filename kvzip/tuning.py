"""Which ratio is enough for a document: what several compressed caches keep of the full cache's answers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from . import checks, prompts
from .cache import DenseCache, RaggedCache, check_pairs, nbytes
from .checks import check_kind, check_texts
from .compression import compress
from .evals.asking import answer_logits
from .generation import generate
from .inputs import check_belongs, check_whole_model, query_ids, tokenizer_of
from .models import Model
from .ratios import FLOOR
from .refitting import refit as fit
from .sources import passages, texts_of

__all__ = ["Choice", "Probe", "Tuning", "tune"]

RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)
BITS = (8,)
PASSAGE = 64
"""Tokens that the model is shown to ask about."""
OPENING, CONTINUED = 12, 24
"""Tokens of a passage to repeat: those that the question quotes, and those that follow."""
QUESTION_TOKENS = 40
SLIPS = 1 / 20
"""The part of a passage's tokens that may be lost: a text is seldom repeated to the letter."""
_BATCH = 8  # answers read at once: each token's logits are as many as the vocabulary has tokens

ASK = 'Here is a part of the text above: "{}"\n\nWrite one short question that this part answers, and nothing else.'
REPEAT = 'Repeat, word by word, the part of the text above that begins with "{}"'


@dataclass(frozen=True)
class Probe:
    """A question, and the answer of the full cache: its own words, or a passage of the document to repeat.

    `asked` and `ids` are the tokens of both.
    """

    question: str
    answer: str
    asked: tuple[int, ...]
    ids: tuple[int, ...]
    repeats: bool


@dataclass(frozen=True)
class Choice:
    """One way to compress a document: the ratio of pairs kept, the bits of each number (None: the model's dtype).

    `answers` of `asked` answers are those of the full cache; `cache_bytes` is what the cache takes. `fitted` is whether
    the pairs were fitted.
    """

    ratio: float
    bits: int | None
    answers: int
    asked: int
    cache_bytes: int
    fitted: bool = False


@dataclass(frozen=True)
class Tuning:
    """What was asked, what each choice keeps, the largest ratio first, and the one that is recommended with its cache.

    If no choice keeps enough, the recommended one keeps all pairs.
    """

    probes: tuple[Probe, ...]
    choices: tuple[Choice, ...]
    recommended: Choice
    cache: RaggedCache
    full_bytes: int


def tune(
    model: Model,
    cache: DenseCache,
    questions: str | Sequence[str] | None = None,
    *,
    ratios: Iterable[SupportsFloat] = RATIOS,
    bits: Iterable[SupportsIndex] = BITS,
    refit: bool = True,
    keep: SupportsFloat = 0.95,
    count: SupportsIndex | None = None,
    max_tokens: SupportsIndex = 48,
    progress: Callable[[str], object] | None = None,
) -> Tuning:
    """Returns how many answers each ratio keeps of those from the full cache, and the smallest that keeps enough.

        full = kvzip.score(model, kvzip.prefill(model, document))
        found = kvzip.tune(model, full)
        small = found.cache

    Without questions the model asks some of its own about passages of the document, answers them from the full
    cache, and is asked to repeat as many other passages; a cache without a chat template has passages only. All answers
    are then read by compressed caches, in one pass each. A token that is the full cache's first choice is lost if it is
    no longer the first and less than half as likely. An answer is kept if none of its tokens is lost, a passage if one
    in twenty is.

    Ratios are tried from the largest on, until one keeps less than `keep` of the answers; the one before it is
    recommended, and tried in fewer bits, and fitted (see `kvzip.refit`), which keeps more of what was not asked.
    Beyond asking and answering this costs a packing of each cache tried, and one fit.

    Args:
        cache: with scores, as for `compress`; it is not changed.
        questions: in place of the model's own; without a chat template each continues the document.
        ratios: fractions of the pairs KEPT to try.
        bits: 8 and 4, each tried at the ratio that is enough.
        refit: whether the recommended cache is fitted, with a floor of a fifth in each head, if that loses no answer.
        keep: the part of the answers that must be kept, in (0, 1]: nearly all, as a few stand for many.
        count: questions, and as many passages; None takes one for 250 tokens, from 5 to 8.
        max_tokens: of an answer.
        progress: called with what is begun, as "asking".

    Raises: ValueError for a cache without scores or of another model, options out of range, no question with text in
        it, or a document too short to ask about; and what `generate` and `compress` raise.
    """
    check_kind(model, Model)
    check_kind(cache, DenseCache)
    check_pairs(cache)
    check_whole_model(model, "tuning")
    check_belongs(model, cache)
    if cache.scores is None:
        raise ValueError("expected a cache with scores, got none: call kvzip.score(model, cache) first")
    tried = sorted({checks.kept_ratio(ratio) for ratio in ratios}, reverse=True)
    packed = [checks.whole(each, "bits") for each in bits]
    if not tried or not set(packed) <= {8, 4}:
        raise ValueError(f"expected ratios to try, and bits of 8 or 4, got {tried} and {packed}: pass ratios=[0.3]")
    enough, some = checks.number(keep, "keep"), min(8, max(5, (cache.length - cache.start) // 250))
    some = some if count is None else checks.whole(count, "count", least=1)
    if not 0 < enough <= 1:
        raise ValueError(f"expected 0 < keep <= 1, the part of answers to keep, got {enough}: 0.95 is a usual one")
    most, step = checks.whole(max_tokens, "max_tokens", least=1), progress or (lambda what: None)
    own = None if questions is None else check_texts(questions, "questions")
    step("asking and answering")
    probes = _answered(model, cache, own, most) if own is not None else []
    if own is None:
        openings = _starts(model, cache, 2 * some)
        if cache.chat:
            about = [ASK.format(_text(model, cache, n, PASSAGE)) for n in openings[::2]]
            made = generate(model, cache, about, max_tokens=QUESTION_TOKENS, stop="\n")
            probes += _answered(model, cache, [each.text.strip() for each in made if each.text.strip()], most)
        probes += [_repeat(model, cache, n) for n in (openings[1::2] if cache.chat else openings)]
    if not probes:
        raise ValueError("expected at least one question, got none: pass questions=[...]")
    step("reading the answers from all pairs")
    full = _probabilities(model, cache, probes)
    needed = enough * len(probes) - 1e-9

    def kept(small: RaggedCache, ratio: float, width: int | None, *, fitted: bool = False) -> Choice:
        step(f"reading the answers from {ratio:.0%}" + (f" in {width} bits" if width else "") + ", fitted" * fitted)
        found = sum(map(_is_kept, probes, full, _probabilities(model, small, probes)))
        return Choice(ratio, width, found, len(probes), nbytes(small), fitted)

    choices, best = [], Choice(1.0, None, len(probes), len(probes), nbytes(cache))
    for ratio in tried:
        choices.append(kept(compress(cache, ratio), ratio, None))
        if choices[-1].answers < needed:
            break
        best = choices[-1]
    for width in packed:
        choices.append(kept(compress(cache, best.ratio, bits=width), best.ratio, width))
        best = choices[-1] if choices[-1].answers >= needed and choices[-1].cache_bytes < best.cache_bytes else best
    small = compress(cache, best.ratio, bits=best.bits)
    if refit and best.ratio < 1:
        step(f"fitting {best.ratio:.0%}")
        fitted = fit(model, cache, compress(cache, best.ratio, floor=FLOOR, bits=best.bits))
        choices.append(kept(fitted, best.ratio, best.bits, fitted=True))
        if choices[-1].answers >= best.answers:
            best, small = choices[-1], fitted
    return Tuning(tuple(probes), tuple(choices), best, small, nbytes(cache))


def _answered(model: Model, cache: DenseCache, questions: Sequence[str], max_tokens: int) -> list[Probe]:
    """The greedy answers of the full cache, of one batch."""
    queries = list(questions)
    answers = generate(model, cache, queries, max_tokens=max_tokens, template=cache.chat) if queries else []
    asked = query_ids(model, cache, queries, template=cache.chat)
    return [
        Probe(question, answer.text, tuple(ids), tuple(answer.token_ids), repeats=False)
        for question, ids, answer in zip(queries, asked, answers, strict=True)
        if answer.token_ids
    ]


def _repeat(model: Model, cache: DenseCache, start: int) -> Probe:
    """A passage that the model is asked to repeat: in a chat from its beginning, else after it."""
    tokenizer = tokenizer_of(model)
    opening = _text(model, cache, start, OPENING)
    if cache.chat:
        question, text = REPEAT.format(opening), _text(model, cache, start, OPENING + CONTINUED)
        ids = prompts.encode_text(tokenizer, text)
    else:
        question = prompts.QUERY_SEPARATOR + opening
        ids = cache.token_ids[start + OPENING : start + OPENING + CONTINUED].tolist()
        text = prompts.decode(tokenizer, ids)
    (asked,) = query_ids(model, cache, [question], template=cache.chat)
    return Probe(question, text, tuple(asked), tuple(ids), repeats=True)


def _text(model: Model, cache: DenseCache, start: int, tokens: int) -> str:
    return prompts.decode(tokenizer_of(model), cache.token_ids[start : start + tokens].tolist()).strip()


def _starts(model: Model, cache: DenseCache, count: int) -> list[int]:
    """Places of the context where a sentence or a line begins, evenly apart, with room for a passage to repeat."""
    pieces = texts_of(tokenizer_of(model), cache.token_ids[cache.start : cache.length].tolist())
    places = [cache.start + n for n, _ in passages(pieces) if n + OPENING + CONTINUED <= len(pieces)]
    places = [n for n in places if _text(model, cache, n, OPENING)]
    if not places:
        raise ValueError(
            f"expected a document of at least {OPENING + CONTINUED} tokens to ask about, got {len(pieces)}: "
            "pass questions"
        )
    return sorted({places[len(places) * n // count] for n in range(count)})


def _probabilities(
    model: Model, cache: DenseCache | RaggedCache, probes: Sequence[Probe]
) -> list[tuple[Float[Tensor, " T"], Tensor]]:
    """The probability of each answer token given those before it, and whether it is the first choice; on the CPU."""
    found = []
    for at in range(0, len(probes), _BATCH):
        some = probes[at : at + _BATCH]
        for scores, probe in zip(
            answer_logits(model, cache, [p.asked for p in some], [p.ids for p in some]), some, strict=True
        ):
            ids = torch.tensor(probe.ids, device=scores.device)
            p = scores.softmax(-1).gather(1, ids[:, None])[:, 0]
            found.append((p.cpu(), (scores.argmax(-1) == ids).cpu()))
    return found


def _is_kept(probe: Probe, full: tuple[Any, Any], small: tuple[Any, Any]) -> bool:
    """Whether no token of an answer is lost, see `tune`."""
    (p_full, first), (p_small, still) = full, small
    lost = int((first & ~still & (p_small < p_full / 2)).sum())
    return lost <= (SLIPS * len(probe.ids) if probe.repeats else 0)
