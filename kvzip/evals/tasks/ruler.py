"""RULER's thirteen tasks at any length: needles of eight kinds, variable tracking, word counts, questions.

Source: RULER, arXiv 2404.06654, whose settings these are. The words are this package's own, and there is no solved
example before variable tracking and word counts. Where a context has keys that RULER does not ask for, `questions`
above 1 asks for them too, each by itself.
"""

import math
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from .base import Example, Question, Request, Task, draws, each, fit, spread
from .data import Row, rows
from .haystack import NOISE, essay_sentences, first_of
from .synthetic import variable_example
from .words import letters, number, pairs, plain_words, random_uuid

COMMON_WORDS, COMMON_TIMES, RARE_TIMES = 10, 30, 3
ZIPF = 2.0
CODED_WORDS = 2000


@dataclass(frozen=True)
class Needles:
    """A needle task: what it hides, in what, and how many keys of how many values one question asks for."""

    haystack: str  # "noise", "essay" or "needles"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, asked=4),
}
_DRAW = {"words": lambda rng: pairs(rng, 1)[0], "numbers": number, "uuids": random_uuid}


def niah(name: str, request: Request, n: int) -> Example:
    """An example of the needle task of that name."""
    kind = NIAH[name]
    hidden = draws(request, f"{name} needles", n)
    sentences = essay_sentences(request.data, hidden) if kind.haystack == "essay" else [NOISE]
    seed = f"{request.seed} {name} {n}"

    def needles(count: int) -> list[tuple[str, list[str]]]:
        rng = draws(request, seed, n)
        found: dict[str, list[str]] = {}
        while len(found) < (count if kind.haystack == "needles" else kind.keys):
            found.setdefault(_DRAW[kind.key](rng), [_DRAW[kind.value](rng) for _ in range(kind.values)])
        return list(found.items())

    def build(count: int) -> str:
        lines = [
            f"One of the special magic {kind.value} for {key} is: {value}."
            for key, values in needles(count)
            for value in values
        ]
        if kind.haystack == "needles":
            return "\n".join(lines)
        joint = "\n" if kind.haystack == "noise" else " "
        return spread(first_of(sentences, count), lines, draws(request, f"{seed} places", n), joint=joint)

    count = fit(build, request.length, request.count)
    found = needles(count)
    hidden.shuffle(found)
    groups = [found[i : i + kind.asked] for i in range(0, len(found), kind.asked)]
    questions = tuple(_niah_question(kind, group) for group in groups[: request.questions])
    instruction = (
        f"Some special magic {kind.value} are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind.value} afterwards."
    )
    return Example(build(count), questions, instruction)


def _niah_question(kind: Needles, group: list[tuple[str, list[str]]]) -> Question:
    values = [value for _, own in group for value in own]
    keys = [key for key, _ in group]
    named = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    one = len(values) == 1
    what, verb = (kind.value[:-1] if one else kind.value), ("is" if one else "are")
    ask = f"What {verb} {'the' if one else 'all the'} special magic {what} for {named} mentioned in the provided text?"
    cloze = f"{ask} The special magic {what} for {named} mentioned in the provided text {verb}"
    return Question(f"Q: {ask}", cloze, (", ".join(values),), "ruler", 128)


def vt(request: Request, n: int) -> Example:
    """One chain of five variables among noise."""
    return variable_example(request, draws(request, "ruler_vt", n), chains=1, metric="ruler")


def cwe(request: Request, n: int) -> Example:
    """Common words: ten words occur thirty times each, the others three times."""

    def build(rare: int) -> str:
        known = plain_words(draws(request, "cwe", n), COMMON_WORDS + rare)
        listed = known[:COMMON_WORDS] * COMMON_TIMES + known[COMMON_WORDS:] * RARE_TIMES
        draws(request, "cwe order", n).shuffle(listed)
        return " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))

    rare = fit(build, request.length, request.count)
    common = plain_words(draws(request, "cwe", n), COMMON_WORDS + rare)[:COMMON_WORDS]
    ask = "What are the 10 most common words in the above list?"
    question = Question(
        f"Q: {ask}",
        f"Question: {ask} Answer: The top 10 words that appear most often in the list are:",
        (", ".join(common),),
        "ruler",
        120,
    )
    instruction = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    return Example(build(rare), (question,), instruction)


def fwe(request: Request, n: int) -> Example:
    """Frequent words: coded words as often as Zipf's law with exponent 2 says, asked for the first three."""
    weights = [1 / rank**ZIPF for rank in range(1, CODED_WORDS + 1)]
    total = math.fsum(weights)
    rng = draws(request, "fwe", n)
    coded = ["...", *(letters(rng, 6, string.ascii_lowercase) for _ in range(CODED_WORDS - 1))]

    def build(count: int) -> str:
        # the most frequent word is dots, which are not asked for
        times = [round(count * (weight / total)) for weight in weights]
        listed = [word for word, own in zip(coded, times, strict=True) for _ in range(own)]
        draws(request, "fwe order", n).shuffle(listed)
        return " ".join(listed)

    ask = "What are the three most frequently appeared words in the above coded text?"
    question = Question(
        f"Q: Do not provide any explanation. Please ignore the dots '....'. {ask}",
        f"Question: {ask} Answer: According to the coded text above, the three most frequently appeared words are:",
        (", ".join(coded[1:4]),),
        "ruler",
        50,
    )
    instruction = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words."
    )
    return Example(build(fit(build, request.length, request.count, start=64)), (question,), instruction)


def documents(name: str, file: str) -> Callable[[Request], Iterator[Example]]:
    """Returns a task of questions about some of many numbered documents; the other documents are distractors.

    A row's context is one document, or `documents` are several, some of which hold the answer to its question.
    """

    def make(request: Request) -> Iterator[Example]:
        found = rows(request.data, file)
        for n in range(request.examples):
            order = list(found)
            draws(request, name, n).shuffle(order)

            def build(count: int, order: list[Row] = order, n: int = n) -> str:
                shown = [text for row in order[:count] for text in row.get("documents", [row["context"]])]
                shown += ["(none)"] * (count - len(order))  # what is beyond the data must count as too long
                draws(request, f"{name} order", n).shuffle(shown)
                return "\n\n".join(f"Document {i + 1}:\n{text}" for i, text in enumerate(shown))

            count = fit(build, request.length, request.count)
            if count > len(order):
                raise ValueError(
                    f"expected a length of at most {request.count(build(len(order)))} tokens for this task, which has "
                    f"{len(order)} rows, got {request.length}"
                )
            asked = [
                Question(f"Q: {text}", f"Question: {text} Answer:", tuple(row["answers"][:1]), "part", 32)
                for row in order[: min(count, request.questions)]
                for text in [row["question"][0]]
            ]
            instruction = (
                "Answer the question based on the given documents. Only give me the answer and do not output any "
                "other words. The following are given documents."
            )
            yield Example(build(count), tuple(asked), instruction)

    return make


TASKS = (
    *(
        Task(f"ruler_{name}", each(partial(niah, name)), 4096, f"RULER, {kind.haystack} haystack")
        for name, kind in NIAH.items()
    ),
    Task("ruler_vt", each(vt), 4096, "RULER, variable tracking"),
    Task("ruler_cwe", each(cwe), 4096, "RULER, common words"),
    Task("ruler_fwe", each(fwe), 4096, "RULER, frequent words"),
    Task("ruler_qa_1", documents("qa_1", "squad_paragraph"), 4096, "RULER, questions about SQuAD paragraphs"),
    Task("ruler_qa_2", documents("qa_2", "hotpotqa"), 4096, "RULER, questions about HotpotQA documents"),
)
