"""A study: how likely reference answers are with caches that were made in several ways, of contexts of some tasks.

Contexts are done one after the other by several processes, on one device or on all that are visible, and each line of
results is a context and one way; a study goes on where it stopped. The data are those of `other_data.py`.
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kvzip
from benchmarks import harness
from benchmarks.other_data import STUDIED, TASKS
from kvzip import DenseCache, Model, RaggedCache, prompts
from kvzip.cli.evaluate import UNFINISHED
from kvzip.evals.asking import ask, gold, prefill_example
from kvzip.evals.metrics import evaluate
from kvzip.evals.tasks import Example, Request, examples
from kvzip.inputs import tokenizer_of

KEYS = ("model", "form", "task", "example", "variant", "ratio", "share")

Wanted = Mapping[str, Any]
"""What of a context is to be made: its variant, and what says how much is kept."""

Make = Callable[
    [Model, Example, dict[str, Any], Wanted, argparse.Namespace],
    tuple[DenseCache | RaggedCache, dict[str, Any]],
]
"""Returns the cache that is wanted, and what is to be said of it. The dict lives as long as a context, see `scored`."""

Measure = Callable[
    [Model, DenseCache | RaggedCache, Example, dict[str, Any], argparse.Namespace],
    dict[str, float],
]
"""Returns what is measured of a cache."""


class Impossible(Exception):
    """What is wanted of this context cannot be; why."""


def add_options(study: argparse.ArgumentParser) -> None:
    """Adds what every study takes."""
    study.add_argument("models", type=Path, nargs="+")
    study.add_argument("--data", help="directory of JSONL files")
    study.add_argument("--tasks", nargs="+", default=STUDIED)
    study.add_argument("--contexts", type=int, default=2, help="of each task")
    study.add_argument("--questions", type=int, default=12, help="of each context")
    study.add_argument("--max-tokens", type=int, default=0, help="of an answer, at most; 0 takes likelihoods alone")
    study.add_argument("--workers", type=int, default=1, help="processes, which take the GPUs in turn")
    study.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    study.add_argument("--chunk", type=int, default=2_000)
    study.add_argument("--form", default="chat", choices=("chat", "cloze"))
    study.add_argument("--seed", type=int, default=19)
    study.add_argument("--dtype", default="bfloat16")
    study.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new is begun")


def study(options: argparse.Namespace, wanted: Sequence[Wanted], make: Make, measure: Measure | None = None) -> int:
    """Does what is missing, in several processes; returns 75 if the time was up before the end."""
    begun = time.monotonic()
    waiting = [(m, t, n) for n in range(options.contexts) for t in options.tasks for m in options.models]
    waiting.sort(key=lambda job: options.models.index(job[0]))  # so that few processes load a second model
    processes = multiprocessing.get_context("spawn")
    taken, left = processes.Value("i", 0), processes.Value("i", 0)
    how = (
        options,
        waiting,
        wanted,
        make,
        measure or answered,
        taken,
        left,
        begun,
        harness.facts(options.device, options.commit),
    )
    workers = [processes.Process(target=work, args=(n, *how)) for n in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        return 1
    return UNFINISHED if left.value else 0


def work(
    place: int,
    options: argparse.Namespace,
    waiting: Sequence[tuple[Path, str, int]],
    wanted: Sequence[Wanted],
    make: Make,
    measure: Measure,
    taken: Any,
    left: Any,
    begun: float,
    facts: Mapping[str, Any],
) -> None:
    """Does one context after the other until none is left or the time is up, which `left` counts."""
    torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
    if options.device == "cuda":
        harness.take_place(place, options.workers)
    done, model, source = {key_of(line) for line in lines_of(options.results)}, None, None
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(waiting):
            return
        path, task, example = waiting[number]
        about = {"model": path.name, "form": options.form, "task": task, "example": example}
        missing = [w for w in wanted if key_of({**about, **w}) not in done]
        if not missing:
            continue
        if source != path:
            model = None
            source, model = path, kvzip.load(path, dtype=getattr(torch, options.dtype), device=options.device)
        assert model is not None
        stem, _, length = task.partition("@")
        request = request_of(model, options)
        made_of = TASKS[stem].make(replace(request, length=int(length))) if stem in TASKS else examples(task, request)
        context = next(itertools.islice(made_of, example, None), None)
        if context is None:
            print(f"{task}: no context {example}", flush=True)
            continue
        held: dict[str, Any] = {}
        for one in missing:
            if time.monotonic() - begun > options.limit:
                left.value += 1
                return
            try:
                cache, told = make(model, context, held, one, options)
            except Impossible as why:
                print(f"{path.name}, {task}, {dict(one)}: {why}", flush=True)
                continue
            line = {"what": "study", **about, **one, "chunk": options.chunk, "tokens": held["kvzip"].length}
            found = measure(model, cache, context, held, options) | generated(model, cache, context, options)
            told |= {key: round(value, 4) for key, value in found.items()}
            harness.record(options.results, [line | told], facts)


def scored(
    model: Model, context: Example, held: dict[str, Any], method: str, options: argparse.Namespace
) -> DenseCache:
    """Returns the context's cache with scores of a method; it is prefilled, and scored by each method, once."""
    for each in dict.fromkeys(("kvzip", method)):
        if each not in held:
            full = held.get("kvzip") or prefill_example(model, context, form=options.form)
            held[each] = kvzip.score(model, full, method=each, chunk=options.chunk)
    return held[method]


def answered(
    model: Model,
    cache: DenseCache | RaggedCache,
    example: Example,
    held: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Returns the mean log-likelihood of the reference answers, and how many are the greedy ones."""
    known = gold(model, cache, example.questions, form=options.form)
    return {
        "loglik": statistics.fmean(one.loglik for one in known),
        "exact": statistics.fmean(one.exact for one in known),
    }


def generated(
    model: Model, cache: DenseCache | RaggedCache, example: Example, options: argparse.Namespace
) -> dict[str, float]:
    """Returns the mean score of greedy answers, if they may have tokens."""
    if not options.max_tokens:
        return {}
    asked = [replace(q, max_tokens=min(q.max_tokens, options.max_tokens)) for q in example.questions]
    answers = [answer.text.strip() for answer in ask(model, cache, asked, form=options.form)]
    scores = [evaluate(q.metric, a, q.answers, q.choices) for q, a in zip(asked, answers, strict=True)]
    return {"score": statistics.fmean(scores)}


def request_of(model: Model, options: argparse.Namespace) -> Request:
    """Returns what tasks make contexts of."""
    tokenizer = tokenizer_of(model)
    counted: Callable[[str], int] = lambda text: len(prompts.encode_text(tokenizer, text))  # noqa: E731
    return Request(options.contexts, options.questions, 0, options.seed, options.data, counted)


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What says which context a line is about, and which way."""
    return tuple(line.get(key) for key in KEYS)


def lines_of(results: Path) -> list[dict[str, Any]]:
    """Returns the lines of studies in results; none where there is no file yet."""
    return [line for line in harness.read_lines(results) if line["what"] == "study"] if results.exists() else []
