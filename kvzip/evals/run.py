"""The harness: prefills a context once, scores it once by each method, and answers every question at every ratio."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, SupportsFloat

from .. import checks, machine
from ..cache import DenseCache, RaggedCache, nbytes
from ..generation import Answer
from ..inputs import tokenizer_of
from ..models import Model
from ..parallel import agreed, everyone
from ..prompts import encode_text
from ..scoring import score
from .asking import Gold, agreement, ask, gold, prefill_example
from .methods import METHODS, Method
from .metrics import GOLD, evaluate
from .plan import FULL, Job, Plan, Step, check_names, digest, jobs
from .results import append, check_growing, check_place, mend, places, read
from .tasks import Example, Request

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""progress(answers done, answers in all, what is being done)."""


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

    Each context is prefilled once and scored once by each method. At each ratio the cache is compressed, and the
    questions are answered in batches from the pairs that are left. Answers that `out` already has are not repeated: a
    killed run goes on where it stopped. Returns whether all is done.

    Args:
        tasks: names such as "squad", "kv@4096" (with a length in tokens), or groups such as "ruler" (see `tasks`).
        out: file of JSON lines (see `results`), made if there is none.
        methods: names in `available`, or "full", which answers from the full cache and has no other ratio than 1.
        ratios: fractions of pairs kept, 0 < ratio <= 1.
        form: "chat" asks through the chat template; "cloze" lets a base model continue a plain text; None takes the
            chat where the model has a template.
        count: contexts of a task, at most (see `Request.examples`).
        questions: questions about a context, at most.
        data: directory of JSONL files with the data of tasks that need some, or "hub".
        batch: questions answered at once.
        max_tokens: tokens of an answer, at most, if fewer than its task says.
        limit_s: seconds after which no further batch of questions is begun.
        commit: written down in place of the commit of the checkout that this file is in.

    Raises: ValueError for an unknown task, method, form or ratio, a context that is too long for the model, a question
        that its metric cannot mark, or one that differs from what `out` has in its place. Nothing is answered then.
    """
    check_growing(out)
    stop = float("inf") if limit_s is None else time.monotonic() + limit_s
    kept = tuple(checks.number(ratio, "ratio", finite=False) for ratio in ratios)
    names = tuple(check_names(tasks, methods, kept, form, available))
    tokenizer = tokenizer_of(model)
    if form == "chat" and model.template is None:
        raise ValueError("expected a model with a chat template for form 'chat', got none: ask in form 'cloze'")
    form = form or ("cloze" if model.template is None else "chat")
    request = Request(count, questions, 0, seed, data, lambda text: len(encode_text(tokenizer, text)))
    plan = Plan(names, tuple(methods), kept, form, request, available, max_tokens, batch)
    return _run(model, plan, out, machine.commit() if commit is None else commit, stop, progress)


def _run(model: Model, plan: Plan, out: Path, commit: str, stop: float, progress: Progress | None) -> bool:
    work = [job for task in plan.tasks for job in jobs(model, task, plan.request, max_tokens=plan.max_tokens)]
    share = model.share

    def found() -> tuple[set[tuple[Any, ...]], dict[tuple[Any, ...], str]]:
        mend(out)
        return ({answer.key for answer in read(out)} if out.exists() else set()), places(out)

    def add(lines: list[dict[str, Any]]) -> None:
        agreed(share, lambda: append(out, lines))

    done, known = agreed(share, found)

    def missing(job: Job, step: Step) -> list[int]:
        return [n for n, own in enumerate(job.ids) if (model.fingerprint, plan.form, own, *step) not in done]

    left = [{step: missing(job, step) for step in plan.steps} for job in work]
    total = len(plan.steps) * sum(len(job.ids) for job in work)
    finished = total - sum(len(numbers) for own in left for numbers in own.values())
    if finished == total:
        return True
    facts = describe(model, plan, commit)
    run = agreed(share, lambda: digest([facts, time.time_ns()]))
    written = set(known.values())
    lines = [question_lines(job, run) for job in work]
    for line in chain(*lines):
        check_place(known, facts, line)
    add([{"kind": "run", "run": run, **facts}])
    for job, own, asked in zip(work, left, lines, strict=True):
        if not any(own.values()):
            continue
        add([line for line in asked if line["id"] not in written])
        for step, cache, alike in caches(model, job.example, [step for step in plan.steps if own[step]], plan):
            for numbers in job.batches(own[step], plan):
                if agreed(share, lambda: time.monotonic() > stop):
                    logger.info("stopped at the time limit with %s of %s answers", finished, total)
                    return False
                together = [job.example.questions[n] for n in numbers]
                reply = gold if together[0].metric == GOLD else ask
                answers = dict(zip(numbers, reply(model, cache, together, form=plan.form), strict=True))
                add(answer_lines(job, run, step, cache, answers, alike))
                finished += len(numbers)
                if progress is not None:
                    progress(finished, total, f"{job.task} {job.number + 1}, {step[0]} at {step[1]:g}")
    return True


def caches(
    model: Model, example: Example, steps: Sequence[Step], plan: Plan
) -> Iterator[tuple[Step, DenseCache | RaggedCache, float | None]]:
    """Yields each step with its cache, and if likelihoods are asked for its `agreement` with KVzip's choice, else None.

    The context is prefilled once and scored once by each method.
    """
    dense = prefill_example(model, example, form=plan.form)
    paper = None
    if any(question.metric == GOLD for question in example.questions):
        paper = score(model, dense, scope="context").scores
    for name, own in groupby(steps, key=lambda step: step[0]):
        method = None if name == FULL else plan.available[name]
        scored = dense if method is None else method.score(model, dense)
        for _, ratio in own:
            cache = dense if method is None else method.compressed(model, scored, ratio)
            yield (name, ratio), cache, None if paper is None else agreement(cache, paper.values, ratio)


def question_lines(job: Job, run: str) -> list[dict[str, Any]]:
    """Returns a line for each question of a job."""
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
    job: Job,
    run: str,
    step: Step,
    cache: DenseCache | RaggedCache,
    answers: Mapping[int, Answer | Gold],
    alike: float | None = None,
) -> list[dict[str, Any]]:
    """Returns a line for each answer, by the number of its question, with its score."""
    lines, sizes = [], everyone(cache.share, nbytes(cache))
    for number, answer in answers.items():
        question = job.example.questions[number]
        line = {"kind": "answer", "run": run, "question": job.ids[number], "method": step[0], "ratio": step[1]}
        line["kept"] = round(cache.kept / cache.total, 6)
        if isinstance(answer, Gold):
            line |= {"score": float(answer.exact), "loglik": round(answer.loglik, 3), "bytes": sum(sizes)}
            line |= {"agreement": round(alike, 6)} if alike is not None else {}
        else:
            prediction = answer.text.strip()
            line["score"] = evaluate(question.metric, prediction, question.answers, question.choices)
            line |= {"stopped": answer.stopped, "prediction": prediction}
        lines.append(line)
    return lines


def describe(model: Model, plan: Plan, commit: str) -> dict[str, Any]:
    """Returns what answers depend on: model, commit, versions and device, and what made the questions; and the date."""
    return {
        "commit": commit,
        "model": Path(model.source).name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": machine.device_name(model.device),
        "versions": machine.versions(),
        "date": machine.now(),
        "form": plan.form,
        "seed": plan.request.seed,
        "count": plan.request.examples,
        "questions": plan.request.questions,
        "max_tokens": plan.max_tokens,
    }
