"""What refitting costs, and which of its variants is best on data outside the published tasks.

    python benchmarks/refitting.py time                               # a published shape at 32,768 and 126,000 tokens
    python benchmarks/refitting.py study MODEL_DIR --data DATA [--tasks ...] [--variants ...] [--limit 560]
    python benchmarks/refitting.py show                               # the study's means, by task, ratio and variant

`time`: seconds and peak memory of `refit` beside scoring; random weights, heads that keep as unequal parts as real
ones.
`study`: likelihood of the reference answers and the score of greedy answers, of contexts that are prefilled and scored
once and then compressed at each ratio, to equal bytes: a cache with biases keeps as many rows fewer as they take. The
data are other tasks than `plans.py` publishes, and where a kind of context is like a published one, another generator
makes it. The study goes on where it stopped (exit code 75 after a time limit). Each figure is one JSON line appended to
benchmarks/results/refitting.jsonl. The published tasks are `evaluation.py --refit`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import kvzip
from benchmarks import harness
from benchmarks.studies import FITS, FLOORS, equal_bytes, floored
from kvzip import DenseCache, Model, RaggedCache, prompts
from kvzip.cache import nbytes
from kvzip.cli.evaluate import UNFINISHED
from kvzip.evals.asking import ask, gold, prefill_example
from kvzip.evals.metrics import evaluate
from kvzip.evals.tasks import Example, Request, examples
from kvzip.inputs import tokenizer_of
from kvzip.machine import timed
from kvzip.options import Refitting
from kvzip.refitting import refit_and_measure

RESULTS = harness.RESULTS / "refitting.jsonl"
RATIOS = (0.1, 0.2, 0.3, 0.5)
VARIANTS = [name + floor for name in ("select", "bias", "both") for floor in FLOORS]
VARIANTS += [name for name in FITS if name not in VARIANTS]
TASKS = (
    "prefix_suffix@4096",
    "ruler_vt@4096",
    "ruler_niah_single_3@4096",
    "ruler_cwe@4096",
    "math_find@4096",
    "quality@7000",
)


def time_part(options: argparse.Namespace) -> int:
    from benchmarks.shapes import random_model, with_scores

    model = random_model(options.shape, max_length=200_000)
    for tokens in options.tokens:
        ids = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(0))
        warm = with_scores(kvzip.prefill(model, ids[:4_500]), model)
        kvzip.refit(model, kvzip.score(model, warm), kvzip.compress(warm, options.ratio))
        del warm
        harness.release()
        dense = with_scores(kvzip.prefill(model, ids), model)
        small = kvzip.compress(dense, options.ratio, bits=options.bits)
        _, score_s = timed(model.device, partial(kvzip.score, model, dense))
        times, peak = [], 0
        for _ in range(options.repeats):
            harness.release()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            (fitted, mass), seconds = timed(model.device, partial(refit_and_measure, model, dense, small, Refitting()))
            peak = max(peak, torch.cuda.max_memory_allocated() - before)
            times.append(seconds)
            new = sum(x.v.nbytes + x.bias.nbytes for x in fitted.context) if options.bits is None else 0
            line = {"before": mass.before.mean().item(), "after": mass.after.mean().item()}
            del fitted
        line |= {"what": "time", "shape": options.shape, "tokens": tokens, "ratio": options.ratio, "bits": options.bits}
        line |= {"score_s": score_s, "refit_s": min(times), "spread_s": max(times) - min(times)}
        line |= {"extra_peak_gib": peak / 2**30, "new_values_gib": new / 2**30}
        harness.record(options.results, [line], harness.facts("cuda", options.commit))
        del dense, small
        harness.release()
    return 0


def study_part(options: argparse.Namespace) -> int:
    """Does what is missing; returns 75 if the time was up before the end."""
    begun, done = time.monotonic(), done_of(options.results)
    model = kvzip.load(options.model, dtype=getattr(torch, options.dtype))
    name, facts = options.model.name, harness.facts(model.device.type, options.commit)
    for task in options.tasks:
        for number, example in enumerate(examples(task, request_of(model, options))):
            wanted = [("full", 1.0), *((v, r) for r in options.ratios for v in options.variants)]
            missing = [w for w in wanted if (name, options.form, task, number, *w) not in done]
            if not missing:
                continue
            dense: DenseCache | None = None
            for variant, ratio in missing:
                if time.monotonic() - begun > options.limit:
                    return UNFINISHED
                if dense is None:
                    dense = kvzip.score(model, prefill_example(model, example, form=options.form), chunk=options.chunk)
                cache, told = made(model, dense, variant, ratio, options.chunk)
                line = {"what": "study", "model": name, "form": options.form, "task": task, "example": number}
                line |= {"variant": variant, "ratio": ratio, "chunk": options.chunk, "tokens": dense.length}
                line |= told | answered(model, cache, example, options)
                harness.record(options.results, [line], facts)
    return 0


def made(
    model: Model, dense: DenseCache, variant: str, ratio: float, chunk: int
) -> tuple[DenseCache | RaggedCache, dict[str, Any]]:
    """Returns the cache of a variant, and what is to be said of it."""
    if variant == "full":
        return dense, {"bytes": nbytes(dense), "kept": 1.0}
    name, plus, floor = variant.partition("+")
    least, told = FLOORS[plus + floor], {}
    small = floored(dense, ratio, least)
    if name != "select":
        how, less = replace(FITS[name], chunk=chunk), equal_bytes(dense, ratio, least)
        (small, mass), seconds = timed(model.device, partial(refit_and_measure, model, dense, less, how))
        told = {"fit_s": round(seconds, 3)}
        told |= {name: round(part.mean().item(), 4) for name, part in vars(mass).items()}
    return small, told | {"bytes": nbytes(small), "kept": round(small.kept / small.total, 6)}


def answered(
    model: Model, cache: DenseCache | RaggedCache, example: Example, options: argparse.Namespace
) -> dict[str, float]:
    """Returns the mean log-likelihood of the reference answers, how many are the greedy ones, and the mean score."""
    known = gold(model, cache, example.questions, form=options.form)
    found = {"loglik": statistics.fmean(one.loglik for one in known)}
    found["exact"] = statistics.fmean(one.exact for one in known)
    if options.max_tokens:
        asked = [replace(q, max_tokens=min(q.max_tokens, options.max_tokens)) for q in example.questions]
        answers = [answer.text.strip() for answer in ask(model, cache, asked, form=options.form)]
        scores = [evaluate(q.metric, a, q.answers, q.choices) for q, a in zip(asked, answers, strict=True)]
        found["score"] = statistics.fmean(scores)
    return {key: round(value, 4) for key, value in found.items()}


def request_of(model: Model, options: argparse.Namespace) -> Request:
    tokenizer = tokenizer_of(model)
    counted: Callable[[str], int] = lambda text: len(prompts.encode_text(tokenizer, text))  # noqa: E731
    return Request(options.contexts, options.questions, 0, options.seed, options.data, counted)


def done_of(results: Path) -> set[tuple[Any, ...]]:
    """What the results have: model, form, task, number of the context, variant and ratio."""
    if not results.exists():
        return set()
    keys = ("model", "form", "task", "example", "variant", "ratio")
    return {tuple(line[key] for key in keys) for line in studied(results)}


def studied(results: Path) -> Iterator[Mapping[str, Any]]:
    return (line for line in harness.read_lines(results) if line["what"] == "study")


def show_part(options: argparse.Namespace) -> int:
    """Prints means over contexts: log-likelihood in nats, score."""
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in studied(options.results):
        cells.setdefault((line["model"], line["task"], line["ratio"], line["variant"]), []).append(line)
    print("model, task, ratio, variant: contexts, log-likelihood, score, kept mass before and after")
    for key, lines in sorted(cells.items(), key=lambda item: item[0][:3]):
        means = {
            name: statistics.fmean(line[name] for line in lines)
            for name in ("loglik", "score", "before", "after")
            if all(name in line for line in lines)
        }
        print(*key, len(lines), json.dumps({name: round(value, 3) for name, value in means.items()}))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parts = parser.add_subparsers(dest="part", required=True)
    times = parts.add_parser("time")
    times.add_argument("--shape", default="llama-3.1-8b")
    times.add_argument("--tokens", type=int, nargs="+", default=[32_768, 126_000])
    times.add_argument("--ratio", type=float, default=0.3)
    times.add_argument("--bits", type=int, choices=(8, 4))
    times.add_argument("--repeats", type=int, default=3)
    study = parts.add_parser("study")
    study.add_argument("model", type=Path)
    study.add_argument("--data", help="directory of JSONL files")
    study.add_argument("--tasks", nargs="+", default=TASKS)
    study.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    study.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    study.add_argument("--contexts", type=int, default=4, help="of each task")
    study.add_argument("--questions", type=int, default=10, help="of each context")
    study.add_argument("--max-tokens", type=int, default=64, help="of an answer, at most; 0 takes likelihoods alone")
    study.add_argument("--chunk", type=int, default=2_000)
    study.add_argument("--form", default="chat", choices=("chat", "cloze"))
    study.add_argument("--seed", type=int, default=19)
    study.add_argument("--dtype", default="bfloat16")
    study.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    parts.add_parser("show")
    options = parser.parse_args()
    return {"time": time_part, "study": study_part, "show": show_part}[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
