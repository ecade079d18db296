"""The harness: contexts prefilled once, scored once by each method, every question answered at every ratio."""

import datetime
import hashlib
import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby
from pathlib import Path
from typing import Any, SupportsFloat

import torch

from .. import checks, prompts
from ..cache import DenseCache, RaggedCache
from ..compression import compress
from ..generation import Answer, generate
from ..inputs import tokenizer_of
from ..models import Model
from ..prefilling import prefill
from .methods import METHODS, Method
from .metrics import check_metric, evaluate
from .results import append, check_place, mend, places, read
from .tasks import Example, Question, Request, examples, expand

logger = logging.getLogger(__name__)

FULL = "full"
"""The name of the full cache among methods: its answers are what the others are compared with."""
FORMS = ("chat", "cloze")
INSTRUCTION = "Given the context, answer to the following question or request without explanation."
ROOM = 2_200  # positions after a context: a repeat pass of scoring, or a question and its answer

Progress = Callable[[int, int, str], None]
"""progress(answers done, answers in all, what is being done)."""


@dataclass(frozen=True)
class Job:
    """A context of a task; `context` is its digest, `ids` are those of its questions, `tokens` its length."""

    task: str
    number: int
    example: Example
    context: str
    ids: tuple[str, ...]
    tokens: int


def run_eval(
    model: Model,
    *,
    tasks: Sequence[str],
    out: Path,
    methods: Sequence[str] = (FULL, "kvzip"),
    ratios: Sequence[SupportsFloat] = (0.1, 0.3, 0.5),
    form: str | None = None,
    count: int = 10,
    questions: int = 10,
    seed: int = 0,
    data: str | None = None,
    batch: int = 32,
    max_tokens: int | None = None,
    limit_s: float | None = None,
    commit: str | None = None,
    available: Mapping[str, Method] = METHODS,
    progress: Progress | None = None,
) -> bool:
    """Answers every question of the tasks by every method at every ratio, and adds a line for each answer to `out`.

    Each context is prefilled once and scored once by each method; at each ratio the cache is really compressed and the
    questions are answered from what is left, as a batch. What `out` already has is not done again, so a killed run goes
    on where it stopped. Returns whether all is done.

    Args:
        tasks: names such as "squad", "kv@4096" (with a length in tokens), or groups such as "ruler" (see `tasks`).
        out: file of JSON lines (see `results`), made if there is none.
        methods: names in `available`, or "full", which answers from the full cache and has no other ratio than 1.
        ratios: fractions of pairs kept, 0 < ratio <= 1.
        form: "chat" asks through the chat template; "cloze" lets a base model continue a plain text; None takes the
            chat where the model has a template.
        count: contexts of a task, at most; what is made of them is in `Request.examples`.
        questions: questions about a context, at most.
        data: directory of JSONL files with the data of tasks that need some, or "hub".
        batch: questions answered at once.
        max_tokens: tokens of an answer, at most, if fewer than its task says.
        limit_s: seconds after which no further batch of questions is begun.
        commit: written down in place of the commit of the checkout that this file is in.

    Raises: ValueError for an unknown task, method, form or ratio, a context that is too long for the model, a question
        that its metric cannot mark, or one that is another than `out` has in its place; nothing is answered then.
    """
    started = time.monotonic()
    ratios = [checks.number(ratio, "ratio", finite=False) for ratio in ratios]
    names = check_names(tasks, methods, ratios, form, available)
    form = form or ("chat" if model.template is not None else "cloze")
    if form == "chat" and model.template is None:
        raise ValueError("expected a model with a chat template for form 'chat', got none: ask in form 'cloze'")
    request = Request(count, questions, 0, seed, data, _counter(model))
    jobs = [job for task in names for job in plan(model, task, request, max_tokens=max_tokens)]
    mend(out)
    done = {answer.key for answer in read(out)} if out.exists() else set()
    steps = [
        (method, ratio)
        for method in dict.fromkeys(methods)
        for ratio in ((1.0,) if method == FULL else dict.fromkeys(ratios))
    ]
    left = [
        {
            step: [n for n, own in enumerate(job.ids) if (model.fingerprint, form, own, *step) not in done]
            for step in steps
        }
        for job in jobs
    ]
    total = len(steps) * sum(len(job.ids) for job in jobs)
    finished = total - sum(len(numbers) for missing in left for numbers in missing.values())
    if finished == total:
        return True
    facts = describe(model, commit)
    facts |= {"form": form, "seed": seed, "count": count, "questions": questions, "max_tokens": max_tokens}
    run = _digest([facts, time.time_ns()])
    known = places(out)
    written = set(known.values())
    lines = [question_lines(job, run) for job in jobs]
    for line in chain(*lines):
        check_place(known, facts, line)
    append(out, [{"kind": "run", "run": run, **facts}])
    for job, missing, asked in zip(jobs, left, lines, strict=True):
        if not any(missing.values()):
            continue
        append(out, [line for line in asked if line["id"] not in written])
        for step, cache in caches(model, job.example, [own for own in steps if missing[own]], form, available):
            for numbers in _batches(job, missing[step], form, batch):
                if limit_s is not None and time.monotonic() - started > limit_s:
                    logger.info("stopped after %.0f s with %s of %s answers", limit_s, finished, total)
                    return False
                answers = ask(model, cache, [job.example.questions[n] for n in numbers], form=form)
                append(out, answer_lines(job, run, step, cache, dict(zip(numbers, answers, strict=True))))
                finished += len(numbers)
                if progress is not None:
                    progress(finished, total, f"{job.task} {job.number + 1}, {step[0]} at {step[1]:g}")
    return True


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


def plan(model: Model, task: str, request: Request, *, max_tokens: int | None = None) -> list[Job]:
    """Returns the contexts of a task with the ids of their questions, each question checked against its metric.

    Raises: ValueError for a context that does not fit in the model's length, or a question that cannot be marked.
    """
    jobs = []
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
        context = _digest([example.instruction, example.context])
        ids = tuple(_digest([task, number, context, n, asdict(q)]) for n, q in enumerate(example.questions))
        jobs.append(Job(task, number, example, context, ids, tokens))
    return jobs


def caches(
    model: Model, example: Example, steps: Sequence[tuple[str, float]], form: str, available: Mapping[str, Method]
) -> Iterator[tuple[tuple[str, float], DenseCache | RaggedCache]]:
    """Yields each step, a method and a ratio, with its cache; prefills once, scores once for each run of a method."""
    dense = prefill_example(model, example, form=form)
    for name, own in groupby(steps, key=lambda step: step[0]):
        if name == FULL:
            yield (FULL, 1.0), dense
            continue
        scored = available[name].score(model, dense)
        for _, ratio in own:
            yield (name, ratio), compress(scored, ratio, level=available[name].level)


def prefill_example(model: Model, example: Example, *, form: str) -> DenseCache:
    """Returns the cache of a context: in a user turn that its instruction opens, or as plain text after it."""
    if form == "chat":
        return prefill(model, example.context, instruction=example.instruction or INSTRUCTION)
    lead = "" if example.instruction is None else example.instruction + prompts.QUERY_SEPARATOR
    return prefill(model, lead + example.context, template=False)


def ask(model: Model, cache: DenseCache | RaggedCache, questions: Sequence[Question], *, form: str) -> list[Answer]:
    """Returns the greedy answers to questions with the same max_tokens and stop texts, as one batch.

    A continuation that begins with its stop text, as some models put an answer on a new line, goes on after it, once.
    """
    limit, stop = questions[0].max_tokens, questions[0].cloze_stop
    if form == "chat":
        return generate(model, cache, [question.query for question in questions], max_tokens=limit)
    texts = [prompts.QUERY_SEPARATOR + question.cloze for question in questions]
    answers = generate(model, cache, texts, max_tokens=limit, stop=stop, template=False)
    begun = [n for n, answer in enumerate(answers) if answer.token_ids and not answer.text.strip()]
    longer = [texts[n] + prompts.decode(tokenizer_of(model), answers[n].token_ids) for n in begun]
    again = dict(zip(begun, generate(model, cache, longer, max_tokens=limit, stop=stop, template=False), strict=True))
    return [again.get(n, answer) for n, answer in enumerate(answers)]


def question_lines(job: Job, run: str) -> list[dict[str, Any]]:
    """Returns the lines that say what a job's questions are."""
    return [
        {
            "kind": "question",
            "id": own,
            "run": run,
            "task": job.task,
            "example": job.number,
            "number": number,
            "context": job.context,
            "tokens": job.tokens,
            "metric": question.metric,
            "query": question.query,
            "cloze": question.cloze,
            "answers": question.answers,
            "facts": dict(question.facts),
        }
        for number, (own, question) in enumerate(zip(job.ids, job.example.questions, strict=True))
    ]


def answer_lines(
    job: Job, run: str, step: tuple[str, float], cache: DenseCache | RaggedCache, answers: Mapping[int, Answer]
) -> list[dict[str, Any]]:
    """Returns a line for each answer, by the number of its question, with its score."""
    lines = []
    for number, answer in answers.items():
        question, prediction = job.example.questions[number], answer.text.strip()
        lines.append(
            {
                "kind": "answer",
                "run": run,
                "question": job.ids[number],
                "method": step[0],
                "ratio": step[1],
                "kept": round(cache.kept / cache.total, 6),
                "score": evaluate(question.metric, prediction, question.answers, question.choices),
                "stopped": answer.stopped,
                "prediction": prediction,
            }
        )
    return lines


def describe(model: Model, commit: str | None = None) -> dict[str, Any]:
    """Returns what answers depend on besides the questions: model, commit, versions, device, and the date."""
    return {
        "commit": commit or _commit(),
        "model": Path(model.source).name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with the build, as +cu126, which the package's metadata may leave out
            "triton": _version("triton"),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _batches(job: Job, numbers: Sequence[int], form: str, batch: int) -> Iterator[list[int]]:
    """The numbers of questions that may be asked together, at most `batch` at once."""

    def alike(number: int) -> tuple[Any, ...]:
        question = job.example.questions[number]
        return (question.max_tokens, *(question.cloze_stop if form == "cloze" else ()))

    for _, own in groupby(sorted(numbers, key=alike), key=alike):
        together = list(own)
        yield from (together[i : i + batch] for i in range(0, len(together), batch))


def _counter(model: Model) -> Callable[[str], int]:
    tokenizer = tokenizer_of(model)
    return lambda text: len(prompts.encode_text(tokenizer, text))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _commit() -> str:
    """The commit of the checkout that holds this file, "+" after it if tracked files have changed; "" outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
