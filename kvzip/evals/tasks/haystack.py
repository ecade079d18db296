"""Text to hide things in, and the needle-in-a-haystack tasks."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence

from .base import Example, Question, Request, Task, draws, fit, insert
from .data import rows
from .words import city_deeds

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LENGTHS = (500, 2000, 8000)
DEPTHS = range(0, 101, 10)

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
ANSWER = "Eat a sandwich and sit in Dolores Park on a sunny day."


def essay_sentences(data: str | None, rng: random.Random) -> list[str]:
    """Returns the sentences of Paul Graham's essays, from a drawn essay on. Raises ValueError without the data."""
    essays = [row["context"] for row in rows(data, "pg_essays")]
    first = rng.randrange(len(essays))
    text = "\n\n".join(essays[first:] + essays[:first])
    return [sentence for sentence in re.split(r"(?<=\.)\s+", text) if sentence]


def first_of(sentences: Sequence[str], n: int) -> list[str]:
    """Returns the first n sentences of the text repeated without end."""
    whole, rest = divmod(n, len(sentences))
    return list(sentences) * whole + list(sentences[:rest])


def needle(request: Request) -> Iterator[Example]:
    """One needle at depths of 0 to 100% in essays, the authors' question; a length of 0 takes their three lengths.

    `examples` is the number of depths of each length, at most 11.
    """
    wanted = min(request.examples, len(DEPTHS))
    depths = [DEPTHS[round(i * (len(DEPTHS) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    sentences = essay_sentences(request.data, draws(request, "needle", 0))
    for length in (request.length,) if request.length else LENGTHS:
        for depth in depths:
            context = hide(sentences, [f"\n{NEEDLE}\n"], [depth], request, length)
            context = context.replace(f" \n{NEEDLE}", f"\n{NEEDLE}").strip()
            yield Example(context, (_question("San Francisco", ANSWER, length, depth),))


def needles(request: Request) -> Iterator[Example]:
    """Eleven needles about eleven cities at depths of 0 to 100% of one context, a question about each.

    The grid of `needle` with an eleventh of the contexts; a length of 0 takes its three lengths.
    """
    for length in (request.length,) if request.length else LENGTHS:
        for n in range(request.examples):
            rng = draws(request, f"needles {length}", n)
            sentences = essay_sentences(request.data, rng)
            deeds = city_deeds(rng, len(DEPTHS))
            asked = [_question(*own, length, depth) for own, depth in zip(deeds.items(), DEPTHS, strict=True)]
            context = hide(sentences, needle_lines(deeds), DEPTHS, request, length)
            yield Example(context, tuple(asked[: request.questions]))


def needle_lines(deeds: Mapping[str, str]) -> list[str]:
    """Returns a line to hide for each city, which says what to do there."""
    return [f"The best thing to do in {city} is {deed}." for city, deed in deeds.items()]


def _question(city: str, answer: str, length: int, depth: int) -> Question:
    return Question(
        f"Q: Based on the content of the book, the best thing to do in {city} is: ",
        f"The best thing to do in {city} is",
        (answer,),
        "include",
        32,
        facts={"length": length, "depth": depth},
    )


def hide(sentences: Sequence[str], lines: Sequence[str], depths: Sequence[int], request: Request, length: int) -> str:
    """Returns as many of the sentences as fit in `length` with the lines, each at its depth (percent) of them."""

    def build(n: int) -> str:
        return insert(first_of(sentences, n), lines, [n * depth // 100 for depth in depths], joint=" ")

    return build(fit(build, length, request.count, start=max(1, length // 25)))


TASKS = (
    Task("needle", needle, 0, "one needle in essays, lengths by depths (NIAH)"),
    Task("needles", needles, 0, "eleven needles in one context, asked one by one"),
)
