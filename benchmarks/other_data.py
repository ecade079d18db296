"""Tasks for choosing defaults: `plans.py` asks none of them, and its contexts have none of their texts.

"phones" and "identifiers" are lists with random values, but not of UUIDs: names with telephone numbers, constants of a
program with theirs. "quote" continues sentences of L-Eval's government reports. With those of the package that
`plans.py` does not ask (`STUDIED`) they are what `refitting.py study` asks.
"""

import itertools
import random
import re
import string
from collections.abc import Callable, Iterator

from kvzip.evals.tasks import Example, Question, Request, Task
from kvzip.evals.tasks.base import draws, each, fit
from kvzip.evals.tasks.data import REPORTS, rows

FIRST = "Ada, Bela, Cora, Dario, Edda, Farid, Goran, Hilda, Ines, Jonas, Kofi, Lena, Marek, Nadia, Otto, Petra, Sami"
LAST = "Abel, Brandt, Castro, Dahl, Eriksen, Gruber, Hansen, Ivanov, Jensen, Keller, Lopez, Moreau, Novak, Okafor"
KINDS = "CACHE, RETRY, BATCH, QUEUE, FRAME, TOKEN, SHARD, EPOCH, LIMIT, OFFSET, BUFFER, STRIDE, MARGIN, WINDOW"
UNITS = "SIZE, COUNT, LIMIT, DELAY, DEPTH, RATIO, WIDTH, BYTES, STEPS, ROUNDS"
OPENING, LEAST, MOST = 6, 6, 25  # words of a sentence that are quoted, and words to continue it with
STUDIED = ("phones@3000", "identifiers@3000", "prefix_suffix@3000", "quote@3000", "quality@7000", "ruler_cwe@3000")


def phones(request: Request, n: int) -> Example:
    """Names with telephone numbers, asked for some of the numbers."""
    several = FIRST.split(", "), string.ascii_uppercase, LAST.split(", ")
    names = [f"{first} {middle}. {last}" for first, middle, last in itertools.product(*several)]

    def number(rng: random.Random) -> str:
        return (
            f"+{rng.randrange(20, 99)} {rng.randrange(100, 999)} {rng.randrange(1000, 9999)} {rng.randrange(100, 999)}"
        )

    return _listed(
        request,
        draws(request, "phones", n),
        names,
        number,
        "{}: {}",
        "Q: What is the telephone number of {}? Give only the number.",
        "The telephone number of {} is",
        "Below is a list of people with their telephone numbers.",
    )


def identifiers(request: Request, n: int) -> Example:
    """Constants of a program, asked for some of their values."""
    names = ["_".join(words) for words in itertools.product(KINDS.split(", "), KINDS.split(", "), UNITS.split(", "))]
    return _listed(
        request,
        draws(request, "identifiers", n),
        names,
        lambda rng: f"0x{rng.getrandbits(40):010x}",
        "{} = {}",
        "Q: What is the value of {} in the program above? Give only the value.",
        "{} =",
        "Below are the constants of a program.",
    )


def quote(request: Request) -> Iterator[Example]:
    """Parts of government reports, asked to continue their sentences."""
    texts = [row["context"] for row in rows(request.data, REPORTS)]
    return (_quoted(request, "quote", n, texts[n % len(texts)]) for n in range(request.examples))


def _listed(
    request: Request,
    rng: random.Random,
    names: list[str],
    value: Callable[[random.Random], str],
    line: str,
    query: str,
    cloze: str,
    instruction: str,
) -> Example:
    rng.shuffle(names)
    found = {name: value(rng) for name in names}

    def build(count: int) -> str:
        return "\n".join(line.format(name, found[name]) for name in names[:count])

    count = min(len(names), fit(build, request.length, request.count))
    asked = rng.sample(names[:count], min(request.questions, count))
    questions = (Question(query.format(x), cloze.format(x), (found[x],), "include", 32) for x in asked)
    return Example(build(count), tuple(questions), instruction)


def _quoted(request: Request, name: str, n: int, text: str) -> Example:
    sentences = re.split(r"(?<=[.:])\s+", text)

    def build(count: int) -> str:
        return " ".join(sentences[:count])

    held = sentences[: min(len(sentences), fit(build, request.length, request.count))]
    split = [(one.split()[:OPENING], one.split()[OPENING : OPENING + MOST]) for one in held]
    openings = [" ".join(first) for first, _ in split]
    able = [
        (opening, " ".join(rest))
        for opening, (_, rest) in zip(openings, split, strict=True)
        if len(rest) >= LEAST and openings.count(opening) == 1
    ]
    asked = draws(request, name, n).sample(able, min(request.questions, len(able)))
    query = 'Q: How does the sentence go on that begins with "{}"? Give only the rest.'
    questions = (Question(query.format(first), first, (rest,), "include") for first, rest in asked)
    return Example(" ".join(held), tuple(questions), "Below is a part of a text.")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("phones", each(phones), 3000, "telephone numbers of names"),
        Task("identifiers", each(identifiers), 3000, "values of constants"),
        Task("quote", quote, 3000, "sentences of reports"),
    )
}
