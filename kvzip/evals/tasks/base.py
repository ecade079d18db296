"""What a task is made of: questions about a context, a request for some of them, and how contexts get their length."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOZE_STOP = ("\n",)
"""A continuation of plain text ends with its line, unless a question says otherwise."""


@dataclass(frozen=True)
class Question:
    """One question about a context, in two forms, and what its answer is compared with.

    Args:
        query: what a chat model is asked.
        cloze: the beginning of a text that a base model continues with the answer, as "The answer is".
        answers: reference answers; the best match counts.
        metric: a name in `metrics.METRICS`.
        max_tokens: at most so many tokens of an answer are generated.
        choices: the options or functions that the answer is one of, for metrics that read them.
        cloze_stop: texts that end an answer in cloze form.
        facts: what the answers are grouped by in a report, as {"depth": 30}.
    """

    query: str
    cloze: str
    answers: tuple[str, ...]
    metric: str
    max_tokens: int = 96
    choices: tuple[str, ...] = ()
    cloze_stop: tuple[str, ...] = CLOZE_STOP
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A context and the questions asked about it, all after it was compressed.

    `instruction` goes before the context; "" is none. None is a general instruction in a chat, and none in cloze form.
    """

    context: str
    questions: tuple[Question, ...]
    instruction: str | None = None


@dataclass(frozen=True)
class Request:
    """What to make of a task.

    Args:
        examples: contexts, at most; a task with less data gives fewer.
        questions: questions about one context, at most.
        length: tokens of a context. Generated contexts are as long as fits, contexts of a data set at most so long.
        seed: of everything drawn; example i is the same for any number of examples.
        data: a directory of JSONL files, "hub" for the Hugging Face hub, None for tasks that need no data.
        count: the number of tokens of a text.
    """

    examples: int
    questions: int
    length: int
    seed: int
    data: str | None
    count: Callable[[str], int]


@dataclass(frozen=True)
class Task:
    """A named source of examples. `length` is what it takes without one given; `about` is one line for a list."""

    name: str
    make: Callable[[Request], Iterator[Example]]
    length: int
    about: str


def each(make: Callable[[Request, int], Example]) -> Callable[[Request], Iterator[Example]]:
    """Returns a generator of the requested number of examples, the n-th of them `make(request, n)`."""
    return lambda request: (make(request, n) for n in range(request.examples))


def draws(request: Request, task: str, example: int) -> random.Random:
    """Returns the random numbers of one example."""
    return random.Random(f"{request.seed} {task} {example}")


def fit(build: Callable[[int], str], length: int, count: Callable[[str], int], *, start: int = 8) -> int:
    """Returns the largest n for which `build(n)` has at most `length` tokens.

    A larger n must give a longer text. The first guesses use the tokens per unit, later ones halve the interval.

    Raises: ValueError if `build(1)` is too long.
    """
    low, high, n, guesses = 0, None, start, 8
    while high is None or high - low > 1:
        tokens = count(build(n))
        low, high = (n, high) if tokens <= length else (low, n)
        guess = n * length // max(1, tokens) if guesses else (low + (high or 4 * n)) // 2
        guesses = max(0, guesses - 1)
        n = max(low + 1, min(guess, 8 * n if high is None else high - 1))
    if low == 0:
        raise ValueError(f"expected a length of at least {count(build(1))} tokens for this task, got {length}")
    return low


def spread(parts: Sequence[str], lines: Sequence[str], rng: random.Random, *, joint: str) -> str:
    """Returns `parts` joined, with `lines` put between them in order, at places drawn without repetition."""
    places = sorted(rng.sample(range(len(parts) + 1), min(len(lines), len(parts) + 1)))
    places += [len(parts)] * (len(lines) - len(places))
    return insert(parts, lines, places, joint=joint)


def insert(parts: Sequence[str], lines: Sequence[str], places: Sequence[int], *, joint: str) -> str:
    """Returns `parts` joined, with each of `lines` in front of the part of that index; `places` ascend."""
    whole = list(parts)
    for line, place in reversed(list(zip(lines, places, strict=True))):
        whole.insert(place, line)
    return joint.join(whole)
