"""Are the sources of answers where the answers came from? Needles in essays, asked of compressed caches.

    python benchmarks/sources.py MODEL --data DATA [--length 500] [--count 10] [--ratio 0.3]

A needle is found if the strongest source of its answer and the hidden sentence overlap by half of the shorter one.
Prints a line for each, and how many answers have the needle; -o adds one JSON line to a file of results.
"""

import argparse
import sys
from pathlib import Path

import harness
import torch

import kvzip
from kvzip.evals import tasks
from kvzip.evals.asking import prefill_example
from kvzip.evals.tasks.haystack import NEEDLE


def overlap(source: kvzip.sources.Source, begin: int, end: int) -> float:
    """Returns which part of the shorter of two spans of characters is in both."""
    shared = min(source.end, end) - max(source.begin, begin)
    return max(0, shared) / max(1, min(source.end - source.begin, end - begin))


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the sources of answers on needles.")
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="directory with pg_essays.jsonl")
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--count", type=int, default=10, help="needles, at depths of 0 to 100%")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--commit", help="where git cannot be asked")
    asked = parser.parse_args()
    model = kvzip.load(asked.model, dtype=getattr(torch, asked.dtype))
    request = tasks.Request(asked.count, 1, 0, asked.seed, asked.data, counter(model))
    right = answered = 0
    for example in tasks.examples(f"needle@{asked.length}", request):
        (question,) = example.questions
        full = kvzip.score(model, prefill_example(model, example, form="chat"))
        small = kvzip.compress(full, asked.ratio)
        answer = kvzip.generate(model, small, question.query, max_tokens=32, sources=3)
        texts = kvzip.sources.texts_of(model.tokenizer, small.token_ids[small.start : small.context_length].tolist())
        begin = "".join(texts).index(NEEDLE)
        found = bool(answer.sources) and overlap(answer.sources[0], begin, begin + len(NEEDLE)) >= 0.5
        right, answered = right + found, answered + ("sandwich" in answer.text)
        shown = answer.sources[0].text.strip()[:70] if answer.sources else ""
        print(f"{question.facts}: {'found' if found else 'missed'}: {answer.text[:60]!r} from {shown!r}", flush=True)
    print(f"{right} of {asked.count} found, {answered} answered")
    if asked.out:
        line = {"benchmark": "sources", "model": Path(asked.model).name, "length": asked.length, "ratio": asked.ratio}
        line |= {"found": right, "answered": answered, "of": asked.count}
        harness.record(asked.out, [line], harness.facts(str(model.device), asked.commit))
    return 0 if right >= 0.9 * asked.count else 1


def counter(model: kvzip.Model):
    """Returns how contexts are measured: the number of a text's tokens."""
    return lambda text: len(model.tokenizer.text.encode(text).ids)


if __name__ == "__main__":
    sys.exit(main())
