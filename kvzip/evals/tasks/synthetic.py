"""SCBench's tasks generated at any length: key-value pairs, strings, variables, numbers, functions, and their mixes.

Source: SCBench, arXiv 2412.10319. Strings and numbers are drawn here, and the functions of the code task are those of
Python's standard library, so that no data is needed; `data.py` has the tasks with SCBench's own data.
"""

import random
import string
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from .base import Example, Question, Request, Task, draws, each, fit, insert, spread
from .data import REPORTS, rows, summary
from .functions import Function, fitting, library_functions
from .haystack import NOISE, needle_lines
from .words import city_deeds, letters, random_uuid

HOPS = 4
CHAIN_TOKENS = 200  # of context for each chain of variables, so that most of it is noise
STRING_LETTERS = 32  # of a string of prefix_suffix
END_LETTERS = 4  # of its prefix and its suffix
LARGEST_NUMBER = 100_000
CODE_INSTRUCTION = "Below are functions of a code repository."


def kv(request: Request, n: int) -> Example:
    """Retr.KV: a JSON object of UUIDs, asked for the values of some keys."""

    def pairs_of(count: int) -> list[tuple[str, str]]:
        rng = draws(request, "kv", n)
        return [(random_uuid(rng), random_uuid(rng)) for _ in range(count)]

    def build(count: int) -> str:
        return "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs_of(count)) + "}"

    count = fit(build, request.length, request.count)
    rng = draws(request, "kv questions", n)
    asked = [_kv_question(*pair) for pair in rng.sample(pairs_of(count), min(request.questions, count))]
    return Example(build(count), tuple(asked), "Extract the value of the specified key in the JSON object below.")


def prefix_suffix(request: Request, n: int) -> Example:
    """Retr.Prefix-Suffix: a list of strings, asked for the one with a prefix and a suffix.

    Half of the others share either the prefix or the suffix of a string that is asked for.
    """
    alphabet = string.ascii_lowercase + string.digits
    rng = draws(request, "prefix_suffix questions", n)
    targets = [letters(rng, STRING_LETTERS, alphabet) for _ in range(request.questions)]

    def build(count: int) -> str:
        rng, made = draws(request, "prefix_suffix", n), targets[:count]
        for i in range(count - len(made)):
            text, target = letters(rng, STRING_LETTERS, alphabet), targets[i % len(targets)]
            shared = [target[:END_LETTERS] + text[END_LETTERS:], text[:-END_LETTERS] + target[-END_LETTERS:]]
            made.append([text, text, *shared][i // len(targets) % 4])
        draws(request, "prefix_suffix order", n).shuffle(made)
        return "\n".join(made)

    count = fit(build, request.length, request.count)
    asked = [
        Question(
            f"Q: Which string in the list starts with {s[:END_LETTERS]} and ends with {s[-END_LETTERS:]}? "
            "Give only the string.",
            f"The string that starts with {s[:END_LETTERS]} and ends with {s[-END_LETTERS:]} is",
            (s,),
            "include",
        )
        for s in targets[:count]
    ]
    return Example(build(count), tuple(asked), "Below is a list of strings. Remember them.")


def multihop(request: Request, n: int) -> Example:
    """Retr.MultiHop: chains of variable assignments among noise, asked for all variables with a value."""
    chains = max(1, min(request.questions, request.length // CHAIN_TOKENS))
    return variable_example(request, draws(request, "multihop", n), chains=chains, metric="fraction")


def variable_example(request: Request, rng: random.Random, *, chains: int, metric: str) -> Example:
    """Returns a context with chains of HOPS assignments after the first, and a question about each chain's value.

    Source: variable tracking of RULER, arXiv 2404.06654.
    """
    names: dict[str, None] = {}
    while len(names) < chains * (HOPS + 1):
        names[letters(rng, 5, string.ascii_uppercase)] = None
    values = rng.sample(range(10_000, 100_000), chains)
    chain = [list(names)[c * (HOPS + 1) : (c + 1) * (HOPS + 1)] for c in range(chains)]
    left = [
        iter([f"VAR {own[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(own))])
        for own, value in zip(chain, values, strict=True)
    ]
    order = [c for c in range(chains) for _ in range(HOPS + 1)]
    rng.shuffle(order)
    mixed = [next(left[c]) for c in order]  # the order within a chain stays
    seed = rng.getrandbits(64)

    def build(n: int) -> str:
        return spread([NOISE] * n, mixed, random.Random(seed), joint="\n")

    asked = [
        Question(
            f"Q: Find all variables that are assigned the value {value} in the text above.",
            f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to "
            f"the chain(s) of variable assignment in the text above, {HOPS + 1} variables are assigned the value "
            f"{value}, they are:",
            (", ".join(own),),
            metric,
        )
        for own, value in zip(chain, values, strict=True)
    ]
    instruction = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    return Example(build(fit(build, request.length, request.count)), tuple(asked), instruction)


def math_find(request: Request, n: int) -> Example:
    """Math.Find: a list of numbers, asked for the largest, the smallest, the next to them, and the median."""
    kinds = ("largest", "smallest", "second largest", "second smallest", "third largest", "third smallest", "median")

    def numbers(count: int) -> list[int]:
        rng = draws(request, "math_find", n)
        return [rng.randrange(LARGEST_NUMBER) for _ in range(count)]

    def build(count: int) -> str:
        return ", ".join(map(str, numbers(count)))

    # an odd count has one median, and a drawn number twice is the second largest too
    count = fit(build, request.length, request.count)
    count -= 1 - count % 2
    if count < len(kinds):
        raise ValueError(f"expected a length in which {len(kinds)} numbers fit, got {request.length}")
    order = sorted(numbers(count))
    found = [order[i] for i in (-1, 0, -2, 1, -3, 2, count // 2)]
    asked = [
        Question(
            f"Q: What is the {kind} number in the list? Give only the number.",
            f"The {kind} number in the list is",
            (str(value),),
            "exact",
            32,
            cloze_stop=("\n", ".", ","),
        )
        for kind, value in zip(kinds, found, strict=True)
    ]
    return Example(build(count), tuple(asked[: request.questions]), "Below is a list of numbers.")


def repoqa(request: Request, n: int) -> Example:
    """Code.RepoQA: functions without their docstrings, asked for the one that a docstring describes."""
    known = list(library_functions())
    draws(request, "repoqa", n).shuffle(known)
    shown = fitting(known, _code, request, draws(request, "more functions", n))
    asked = draws(request, "repoqa questions", n).sample(shown, min(request.questions, len(shown)))
    return Example(_code(shown), tuple(_function_question(f, shown) for f in asked), CODE_INSTRUCTION)


def sum_needles(request: Request) -> Iterator[Example]:
    """Mix.Sum+NIAH: a government report with needles in it, asked for its summary and, in turn, the needles."""
    reports = [row for row in rows(request.data, REPORTS) if request.count(row["context"]) <= request.length]
    if not reports:
        raise ValueError(f"expected a length in which a report fits, got {request.length}: they have 3,000 tokens up")
    for n, row in enumerate(reports[: request.examples]):
        rng = draws(request, "sum_needles", n)
        deeds = city_deeds(rng, max(1, request.questions - 1))
        asked = [summary(row["question"][0], row["answers"][0])]
        for city, deed in deeds.items():
            text = f"The best thing to do in {city} is"
            asked.append(Question(f"Q: {text}: ", text, (deed,), "include", 32))
        context = spread(row["context"].split("\n"), needle_lines(deeds), rng, joint="\n")
        yield Example(context, _labelled(asked, ["summary"] + ["needle"] * len(deeds)))


def repoqa_kv(request: Request, n: int) -> Example:
    """Mix.RepoQA+KV: functions with key-value pairs between them, asked for either in turn."""
    rng = draws(request, "repoqa_kv", n)
    known = list(library_functions())
    rng.shuffle(known)
    half = max(1, request.questions // 2)
    pairs = [(random_uuid(rng), random_uuid(rng)) for _ in range(half)]
    lines = [f'# "{key}": "{value}"' for key, value in pairs]

    def build(functions: list[Function]) -> str:
        places = [i * len(functions) // len(lines) for i in range(len(lines))]
        return insert([code for code, _ in functions], lines, places, joint="\n\n")

    shown = fitting(known, build, request, draws(request, "more functions", n))
    asked = [_function_question(f, shown) for f in rng.sample(shown, min(half, len(shown)))]
    kinds = ["repoqa"] * len(asked) + ["kv"] * len(pairs)
    asked += [_kv_question(*pair) for pair in pairs]
    return Example(build(shown), _labelled(asked, kinds)[: request.questions], CODE_INSTRUCTION)


def _code(functions: list[Function]) -> str:
    return "\n\n".join(code for code, _ in functions)


def _function_question(function: Function, shown: list[Function]) -> Question:
    code, about = function
    query = (
        f"Q: Which of the functions above does this? {about}\n"
        "Repeat that function exactly, from its first line to its last, in a code block."
    )
    cloze = f"The function above that does this ({about}):\n```python\n"
    choices = tuple(other for other, _ in shown)
    return Question(query, cloze, (code,), "repoqa", 512, choices=choices, cloze_stop=("```",))


def _kv_question(key: str, value: str) -> Question:
    query = f'Q: Key: "{key}"\nThe value associated with the specified key is: '
    return Question(query, f'"{key}": "', (value,), "include")


def _labelled(asked: list[Question], kinds: list[str]) -> tuple[Question, ...]:
    """The questions of each kind in turn, labelled with it."""
    turns = sorted(range(len(asked)), key=lambda i: (kinds[:i].count(kinds[i]), i))
    return tuple(replace(asked[i], facts={"subtask": kinds[i]}) for i in turns)


TASKS = (
    Task("kv", each(kv), 4096, "JSON of UUIDs (Retr.KV)"),
    Task("prefix_suffix", each(prefix_suffix), 4096, "strings by prefix and suffix (Retr.Prefix-Suffix)"),
    Task("multihop", each(multihop), 4096, "chains of variables (Retr.MultiHop)"),
    Task("math_find", each(math_find), 4096, "largest, smallest, ... of numbers (Math.Find)"),
    Task("repoqa", each(repoqa), 4096, "functions by their description (Code.RepoQA)"),
    Task("sum_needles", sum_needles, 100_000, "report summaries and needles (Mix.Sum+NIAH)"),
    Task("repoqa_kv", each(repoqa_kv), 4096, "functions and key-value pairs (Mix.RepoQA+KV)"),
)
