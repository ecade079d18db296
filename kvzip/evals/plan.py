"""What an evaluation is asked to do: its tasks as contexts with questions, and the caches that answer them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from ..models import Model
from .methods import METHODS, Method
from .metrics import GOLD, check_metric
from .tasks import Example, Request, examples, expand

FULL = "full"
"""The name of the full cache among methods: its answers are what the others are compared with."""
FORMS = ("chat", "cloze")
ROOM = 2_200  # positions after a context: a repeat pass of scoring, or a question and its answer

Step = tuple[str, float]
"""A method and a ratio."""


@dataclass(frozen=True)
class Plan:
    """What is asked of which caches, see `run_eval`; `tasks` has no groups, `form` is one of FORMS."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    form: str
    request: Request
    available: Mapping[str, Method]
    max_tokens: int | None = None
    batch: int = 32

    @property
    def steps(self) -> list[Step]:
        """Every method at every ratio, each once."""
        methods, ratios = dict.fromkeys(self.methods), dict.fromkeys(self.ratios)
        return [(method, ratio) for method in methods for ratio in ((1.0,) if method == FULL else ratios)]


@dataclass(frozen=True)
class Job:
    """A context of a task; `context` is its digest, `ids` are those of its questions, `tokens` its length."""

    task: str
    number: int
    example: Example
    context: str
    ids: tuple[str, ...]
    tokens: int

    def batches(self, numbers: Sequence[int], plan: Plan) -> Iterator[list[int]]:
        """Yields the numbers of questions that may be asked together, at most `plan.batch` at once."""

        def alike(number: int) -> tuple[Any, ...]:
            question = self.example.questions[number]
            return (question.metric == GOLD, question.max_tokens, *(question.cloze_stop * (plan.form == "cloze")))

        for _, own in groupby(sorted(numbers, key=alike), key=alike):
            together = list(own)
            yield from (together[i : i + plan.batch] for i in range(0, len(together), plan.batch))


def check_names(
    tasks: Sequence[str],
    methods: Sequence[str],
    ratios: Sequence[float],
    form: str | None,
    available: Mapping[str, Method] = METHODS,
) -> list[str]:
    """Returns the names of the tasks, groups replaced by their tasks; needs neither a model nor data.

    Raises: ValueError for a name that is not known, a ratio outside (0, 1], or nothing to do.
    """
    known = [FULL, *available]
    for name in methods:
        if name not in known:
            raise ValueError(f"expected methods among {known}, got {name!r}")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise ValueError(f"expected ratios in (0, 1], the fraction of pairs that is KEPT, got {ratio}")
    if form not in (None, *FORMS):
        raise ValueError(f"expected form 'chat' or 'cloze', got {form!r}")
    if not tasks or not methods or (not ratios and set(methods) != {FULL}):
        raise ValueError(f"expected tasks, methods and ratios, got {list(tasks)}, {list(methods)}, {list(ratios)}")
    return expand(list(tasks))


def jobs(model: Model, task: str, request: Request, *, max_tokens: int | None = None) -> list[Job]:
    """Returns the contexts of a task with the ids of their questions, each question checked against its metric.

    Raises: ValueError for a context that does not fit in the model's length, or a question that cannot be marked.
    """
    found = []
    for number, example in enumerate(examples(task, request)):
        if max_tokens is not None:
            asked = tuple(replace(q, max_tokens=min(q.max_tokens, max_tokens)) for q in example.questions)
            example = replace(example, questions=asked)
        tokens = request.count(example.context)
        if tokens + ROOM > model.config.max_length:
            raise ValueError(
                f"expected contexts of at most {model.config.max_length - ROOM} tokens (the model's length, less "
                f"{ROOM} for scoring and questions), got {tokens} in {task}: name a length, as in kv@2000"
            )
        for question in example.questions:
            check_metric(question.metric, question.answers, question.choices)
        context = digest([example.instruction, example.context])
        ids = tuple(digest([task, number, context, n, asdict(q)]) for n, q in enumerate(example.questions))
        found.append(Job(task, number, example, context, ids, tokens))
    return found


def digest(value: Any) -> str:
    """Returns twelve hex digits of the JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
