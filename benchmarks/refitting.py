"""What refitting costs, and which of its variants is best on data outside the published tasks.

    python benchmarks/refitting.py time                               # a published shape at 32,768 and 126,000 tokens
    python benchmarks/refitting.py host MODEL_DIR [--tokens 1500]     # a real model on a CPU; and dtypes of the biases
    python benchmarks/refitting.py study MODEL_DIR [MODEL_DIR ...] --data DATA [--workers 6] [--limit 230]
    python benchmarks/refitting.py show                               # the study's means, by task, ratio and variant

`time`: seconds and peak memory of `refit` beside scoring; random weights, heads that keep as unequal parts as real
ones. `beyond_gib` is what the peak is above the dense cache, the one that is fitted, and the new values of the result.
`host`: seconds of `refit` beside scoring, in turns, and likelihoods of reference answers with biases in float16 and in
float32, which are the same fit rounded.
`study`: likelihood of the reference answers, how many of them greedy decoding gives, and with --max-tokens the score of
greedy answers, of contexts that are prefilled and scored once and then compressed at each ratio, to equal bytes: a
cache with biases keeps as many rows fewer as they take. The data are those of `other_data.py`. A variant is "select" or
a fit of `studies.FITS`, with a floor of rows ("+fifth" of each head's equal share) and scores ("@kvzip+") after it.
The study goes on where it stopped (exit code 75 after a time limit). Each figure is one JSON line appended to
benchmarks/results/refitting.jsonl. The published tasks are `evaluation.py --refit`.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import kvzip
from benchmarks import harness, studying
from benchmarks.other_data import TASKS
from benchmarks.studies import FITS, FLOORS, equal_bytes, floored
from kvzip import DenseCache, Model, RaggedCache
from kvzip.cache import nbytes
from kvzip.evals.asking import gold, prefill_example
from kvzip.evals.tasks import Example
from kvzip.machine import timed
from kvzip.options import Refitting
from kvzip.refitting import fit_rows, refit_and_measure

RESULTS = harness.RESULTS / "refitting.jsonl"
RATIOS = (0.1, 0.2, 0.3, 0.5)
VARIANTS = (
    *(name + floor for name in ("select", "both") for floor in ("", "+tenth", "+fifth", "+half")),
    *(name + floor + "@kvzip+" for name in ("select", "both") for floor in ("", "+fifth", "+half")),
    *("bias", "bias+fifth", "values", "both:pull=0.01", "both:pull=1", "both:bound=1", "both:bound=5", "both:every=4"),
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
        line |= {"extra_peak_gib": peak / 2**30, "new_values_gib": new / 2**30, "beyond_gib": (peak - new) / 2**30}
        harness.record(options.results, [line], harness.facts("cuda", options.commit))
        del dense, small
        harness.release()
    return 0


def host_part(options: argparse.Namespace) -> int:
    model = kvzip.load(options.model, dtype=getattr(torch, options.dtype), device="cpu")
    facts = harness.facts("cpu", options.commit)
    request = studying.request_of(model, options)
    context = next(iter(TASKS[options.task].make(replace(request, length=options.tokens))))
    full = prefill_example(model, context, form="chat")
    calls: dict[str, Callable[[], float]] = {"score": lambda: timed(model.device, lambda: kvzip.score(model, full))[1]}
    dense = kvzip.score(model, full)
    for ratio in options.ratios:
        small = kvzip.compress(dense, ratio)
        calls[f"{ratio:g}"] = partial(
            lambda small: timed(model.device, lambda: kvzip.refit(model, dense, small))[1], small
        )
    for name, seconds in harness.in_turns(calls, options.repeats).items():
        line = {"what": "host", "model": options.model.name, "dtype": options.dtype, "tokens": dense.length}
        harness.record(
            options.results, [line | {"of": name, "seconds": statistics.median(seconds), "all": seconds}], facts
        )
    for ratio in options.ratios:
        small = kvzip.compress(dense, ratio)
        with torch.no_grad():
            rows, _ = fit_rows(model, dense, small.context, Refitting(), dtype=torch.float32)
        for dtype in (torch.float32, torch.float16):
            pairs = zip(small.context, rows, strict=True)
            fitted = tuple(x if r is None else replace(x, v=r.values, bias=r.bias.to(dtype)) for x, r in pairs)
            known = gold(model, replace(small, context=fitted), context.questions, form="chat")
            line = {"what": "dtype", "model": options.model.name, "ratio": ratio, "bias": str(dtype)}
            line |= {"logliks": [round(one.loglik, 5) for one in known]}
            harness.record(options.results, [line | {"mean": statistics.fmean(line["logliks"])}], facts)
    return 0


def study_part(options: argparse.Namespace) -> int:
    wanted = [{"variant": "full", "ratio": 1.0}]
    wanted += [{"variant": v, "ratio": r} for r in options.ratios for v in options.variants]
    return studying.study(options, wanted, made)


def made(
    model: Model,
    context: Example,
    held: dict[str, Any],
    wanted: Mapping[str, Any],
    options: argparse.Namespace,
) -> tuple[DenseCache | RaggedCache, dict[str, Any]]:
    """Returns the cache of a variant, and what is to be said of it. See `studying.Make`."""
    name, _, method = wanted["variant"].partition("@")
    scored, ratio = studying.scored(model, context, held, method or "kvzip", options), wanted["ratio"]
    if name == "full":
        return scored, {"bytes": nbytes(scored), "kept": 1.0}
    name, plus, floor = name.partition("+")
    least, told = FLOORS[plus + floor], {}
    small = floored(scored, ratio, least)
    if name != "select":
        how, less = replace(FITS[name], chunk=options.chunk), equal_bytes(scored, ratio, least)
        (small, mass), seconds = timed(model.device, partial(refit_and_measure, model, scored, less, how))
        told = {"fit_s": round(seconds, 3)}
        told |= {name: round(part.mean().item(), 4) for name, part in vars(mass).items()}
    return small, told | {"bytes": nbytes(small), "kept": round(small.kept / small.total, 6)}


def show_part(options: argparse.Namespace) -> int:
    """Prints means over the contexts of each task, then over tasks: as parts of the full cache's, and in nats."""
    lines = {studying.key_of(line): line for line in studying.lines_of(options.results)}
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines.values():
        cells.setdefault((line["model"], line["ratio"], line["variant"], line["task"]), []).append(line)
    names = ("loglik", "exact", "score", "before", "after", "fit_s")
    means = {
        key: {name: statistics.fmean(x[name] for x in own) for name in names if all(name in x for x in own)}
        for key, own in cells.items()
    }
    print("model, ratio, variant, task: contexts, means")
    for key, own in sorted(means.items()):
        print(*key, len(cells[key]), json.dumps({name: round(value, 3) for name, value in own.items()}))
    print("model, ratio, variant: tasks, nats lost to the full cache, exact")
    by_variant: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for (model, ratio, variant, task), own in means.items():
        full = means.get((model, 1.0, "full", task))
        if full is not None and variant != "full":
            by_variant.setdefault((model, ratio, variant), []).append((full["loglik"] - own["loglik"], own["exact"]))
    found = [
        (*key, *(statistics.fmean(x) for x in zip(*own, strict=True)), len(own)) for key, own in by_variant.items()
    ]
    for model, ratio, variant, lost, exact, tasks in sorted(found, key=lambda line: (line[0], line[1], line[3])):
        print(model, ratio, variant, tasks, f"{lost:.3f} {100 * exact:.1f}%")
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
    host = parts.add_parser("host")
    host.add_argument("model", type=Path)
    host.add_argument("--data", help="directory of JSONL files")
    host.add_argument("--task", default="identifiers", choices=TASKS)
    host.add_argument("--tokens", type=int, default=1_500)
    host.add_argument("--ratios", nargs="+", type=float, default=(0.1, 0.3))
    host.add_argument("--questions", type=int, default=20)
    host.add_argument("--repeats", type=int, default=3)
    host.add_argument("--dtype", default="float32")
    host.set_defaults(contexts=1, seed=19)
    study = parts.add_parser("study")
    studying.add_options(study)
    study.add_argument("--variants", nargs="+", default=VARIANTS)
    study.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parts.add_parser("show")
    options = parser.parse_args()
    return {"time": time_part, "host": host_part, "study": study_part, "show": show_part}[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
