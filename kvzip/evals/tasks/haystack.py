"""Text to hide things in, and the needle-in-a-haystack tasks."""

import random
import re
from collections.abc import Iterator, Sequence

from .base import Example, Question, Request, Task, draws, fit, insert
from .data import rows
from .words import CITIES, DEEDS

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
    for length in (request.length,) if request.length else LENGTHS:
        sentences = essay_sentences(request.data, draws(request, "needle", 0))
        for depth in depths:
            context = hide(sentences, [f"\n{NEEDLE}\n"], [depth], request, length)
            context = context.replace(f" \n{NEEDLE}", f"\n{NEEDLE}").strip()
            question = Question(
                "Q: Based on the content of the book, the best thing to do in San Francisco is: ",
                "The best thing to do in San Francisco is",
                (ANSWER,),
                "include",
                32,
                facts={"length": length, "depth": depth},
            )
            yield Example(context, (question,))


def needles(request: Request) -> Iterator[Example]:
    """Eleven needles about eleven cities at depths of 0 to 100% of one context, a question about each.

    The grid of `needle` with an eleventh of the contexts; a length of 0 takes its three lengths.
    """
    for length in (request.length,) if request.length else LENGTHS:
        for n in range(request.examples):
            rng = draws(request, f"needles {length}", n)
            sentences = essay_sentences(request.data, rng)
            cities, deeds = rng.sample(CITIES, len(DEPTHS)), rng.sample(DEEDS, len(DEPTHS))
            lines = [f"The best thing to do in {city} is {deed}." for city, deed in zip(cities, deeds, strict=True)]
            asked = [
                Question(
                    f"Q: Based on the content of the book, the best thing to do in {city} is: ",
                    f"The best thing to do in {city} is",
                    (deed,),
                    "include",
                    32,
                    facts={"length": length, "depth": depth},
                )
                for city, deed, depth in zip(cities, deeds, DEPTHS, strict=True)
            ]
            yield Example(hide(sentences, lines, DEPTHS, request, length), tuple(asked[: request.questions]))


def hide(sentences: Sequence[str], lines: Sequence[str], depths: Sequence[int], request: Request, length: int) -> str:
    """Returns as many of the sentences as fit in `length` with the lines, each at its depth (percent) of them."""

    def build(n: int) -> str:
        return insert(first_of(sentences, n), lines, [n * depth // 100 for depth in depths], joint=" ")

    return build(fit(build, length, request.count, start=max(1, length // 25)))


TASKS = (
    Task("needle", needle, 0, "one needle in essays, lengths by depths (NIAH)"),
    Task("needles", needles, 0, "eleven needles in one context, asked one by one"),
)
