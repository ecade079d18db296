"""Does what `kvzip tune` recommends keep the score? Contexts of the published tasks that nothing was tuned on.

    python benchmarks/tuning.py MODEL --data DATA [--contexts 40] [-o benchmarks/results/tuning.jsonl]

For each context the tuner sees the document alone. Then the task's own questions are asked of the full cache and of the
recommended one. A context is kept if the recommended cache has at least 90% of the full cache's score; the aim is nine
of ten.

Contexts that the full cache scores 0 in say nothing and are replaced. The tuner's time has three parts: asking, which
is generation; reading the answers from each cache; and packing and fitting, which come beyond answering. The last two
are given in scoring passes too.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import torch

import kvzip
from kvzip.evals import metrics, tasks
from kvzip.evals.asking import ask, prefill_example
from kvzip.machine import timed
from kvzip.ratios import FLOOR

TASKS = ("squad@2000", "kv@1500", "needles@2000", "prefix_suffix@1500", "multihop@1500", "ruler_niah_single_2@2000")
TASKS += ("ruler_vt@2000", "ruler_qa_1@2000", "repoqa@2000", "math_find@1500")
SEED = 60_427  # of nothing published or tuned on
PART = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what the tuner recommends on contexts of the published tasks.")
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--contexts", type=int, default=40)
    parser.add_argument("--questions", type=int, default=10, help="of the task, about each context")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--keep", type=float, default=0.95, help="as of `kvzip tune`")
    parser.add_argument("--count", type=int, default=8, help="as of `kvzip tune`")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--commit", help="where git cannot be asked")
    parser.add_argument("-o", "--out", type=Path)
    asked = parser.parse_args()
    model = kvzip.load(asked.model, dtype=getattr(torch, asked.dtype))
    about = {"benchmark": "tuning", "model": Path(asked.model).name, "seed": asked.seed, "keep": asked.keep}
    facts = harness.facts(str(model.device), asked.commit)
    lines = []
    for task, example in contexts(model, asked):
        line = check(model, task, example, asked)
        if line is None:
            print(f"{task}: the full cache scores 0, replaced", flush=True)
            continue
        lines.append(line)
        best = f"{line['ratio']:.0%}" + (f" in {line['bits']} bits" if line["bits"] else "")
        print(
            f"{task}: {best} recommended ({line['answers']}), scores {line['full']:.2f} -> {line['small']:.2f}"
            f"{'' if line['kept'] else ', LOST'}, in scoring passes reading answers took {line['reading_passes']:.1f}, "
            f"packing {line['beyond_passes']:.1f}",
            flush=True,
        )
        if asked.out:
            harness.record(asked.out, [about | line], facts, show=False)
        if len(lines) == asked.contexts:
            break
    kept = sum(line["kept"] for line in lines)
    ratios = sorted(line["ratio"] for line in lines)
    slowest = max(line["beyond_passes"] for line in lines)
    print(
        f"{kept} of {len(lines)} contexts keep {PART:.0%} of the full cache's score at what is recommended; "
        f"ratios {ratios}; at most {slowest:.1f} scoring passes beyond answering"
    )
    return 0 if kept >= 0.9 * len(lines) and slowest <= 3 else 1


def contexts(model: kvzip.Model, asked: argparse.Namespace) -> Iterator[tuple[str, tasks.Example]]:
    """Yields contexts of each task in turn, three times as many as are wanted."""
    each = -(-3 * asked.contexts // len(asked.tasks))

    def count(text: str) -> int:
        return len(model.tokenizer.text.encode(text).ids)  # pyright: ignore[reportOptionalMemberAccess]

    request = tasks.Request(each, asked.questions, 0, asked.seed, asked.data, count)
    running = {task: tasks.examples(task, request) for task in asked.tasks}
    for _ in range(each):
        for task, examples in running.items():
            if (example := next(examples, None)) is not None:
                yield task, example


def check(model: kvzip.Model, task: str, example: tasks.Example, asked: argparse.Namespace) -> dict | None:
    """Returns what was recommended for one context and what it keeps; None if the full cache scores 0."""
    form = "chat" if model.template is not None else "cloze"
    full, prefill_s = timed(model.device, lambda: prefill_example(model, example, form=form))
    full_score = scored(model, full, example, form)
    if not full_score:
        return None
    cache, score_s = timed(model.device, lambda: kvzip.score(model, full))
    marks = []
    found, tune_s = timed(
        model.device,
        lambda: kvzip.tune(
            model, cache, keep=asked.keep, count=asked.count, progress=lambda _: marks.append(time.perf_counter())
        ),
    )
    asking_s = marks[1] - marks[0]  # then the answers are read
    packed = [(choice.ratio, choice.bits, choice.fitted) for choice in found.choices]
    packing_s = sum(timed(model.device, lambda how=how: pack(model, cache, *how))[1] for how in packed)
    small_score = scored(model, found.cache, example, form)
    best = found.recommended
    return {
        "task": task,
        "tokens": full.length,
        "ratio": best.ratio,
        "bits": best.bits,
        "answers": f"{best.answers} of {best.asked}",
        "fitted": best.fitted,
        "choices": [[choice.ratio, choice.bits, choice.fitted, choice.answers] for choice in found.choices],
        "full": full_score,
        "small": small_score,
        "kept": small_score >= PART * full_score - 1e-9,
        "prefill_s": prefill_s,
        "score_s": score_s,
        "asking_s": asking_s,
        "tune_s": tune_s,
        "packing_s": packing_s,
        "reading_passes": (tune_s - asking_s - packing_s) / score_s,
        "beyond_passes": packing_s / score_s,
    }


def pack(
    model: kvzip.Model, cache: kvzip.DenseCache, ratio: float, bits: int | None, fitted: bool
) -> kvzip.RaggedCache:
    """What the tuner does to try a choice, but for reading the answers."""
    if fitted:
        return kvzip.refit(model, cache, kvzip.compress(cache, ratio, bits=bits, floor=FLOOR))
    return kvzip.compress(cache, ratio, bits=bits)


def scored(model: kvzip.Model, cache: kvzip.DenseCache | kvzip.RaggedCache, example: tasks.Example, form: str) -> float:
    """Returns the mean score of a cache's answers to the questions about a context, which end alike."""

    def alike(question: tasks.Question) -> tuple:
        return (question.max_tokens, *question.cloze_stop)

    total = 0.0
    for _, group in itertools.groupby(sorted(example.questions, key=alike), key=alike):
        together = list(group)
        for question, answer in zip(together, ask(model, cache, together, form=form), strict=True):
            total += metrics.evaluate(question.metric, answer.text, question.answers, question.choices)
    return total / len(example.questions)


if __name__ == "__main__":
    sys.exit(main())
