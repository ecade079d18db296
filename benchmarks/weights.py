"""What weights in 8 and 4 bits change: the pairs kept, answers, likelihoods; and a model twice the size of the card.

    python benchmarks/weights.py quality MODEL_DIR [MODEL_DIR ...] --data DATA [--forms int8 fp8 int4] [--limit 560]
    python benchmarks/weights.py show                      # means by form, with intervals of the difference to 16 bits
    python benchmarks/weights.py size [--shape llama-3.1-70b] [--form int4] [--tokens 126000]

`quality`: each context is prefilled and scored by each form's own model. `overlap` is the share of the pairs that the
16-bit model keeps which the form keeps too, at each ratio. Of every question:
log-likelihood of the reference answer and the score of the answer decoded greedily, with all pairs and with 0.3 of
them, both by the form's own scores. Each context by each form is one JSON line; the same command goes on where it
stopped (exit code 75 after a time limit). Without --data take tasks that need none, as kv@2000 and multihop@2000.
`size`: a shape with random codes reads a context in segments (`prefill_compressed`), then answers a question: seconds,
peak memory, and milliseconds of a step beside what its bytes take at the card's read bandwidth.

Lines are added to benchmarks/results/weights.jsonl.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import kvzip
from benchmarks import harness
from benchmarks.harness import release
from benchmarks.shapes import random_model, shapes
from kvzip import prompts
from kvzip.cli.evaluate import UNFINISHED
from kvzip.evals.asking import ask, gold, prefill_example
from kvzip.evals.metrics import evaluate
from kvzip.evals.tasks import Example, Request, examples
from kvzip.inputs import tokenizer_of
from kvzip.machine import clock, timed
from kvzip.models.weights import named_tensors

RESULTS = harness.RESULTS / "weights.jsonl"
PLAIN = "16 bits"
FORMS = ("int8", "fp8", "int4", "int4+int8")  # after a plus: the head
RATIOS = (0.1, 0.3, 0.5)
ANSWERED = (1.0, 0.3)
TASKS = ("gold@4000", "squad@2000", "kv@4096", "ruler_qa_1@4096")
READ_BANDWIDTH = 3.07e12  # bytes a second of one H100, a sum over 2 GiB
KEYS = ("model", "task", "example", "weights")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parts = parser.add_subparsers(dest="part", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quality = parts.add_parser("quality")
    quality.add_argument("models", type=Path, nargs="+")
    quality.add_argument("--data", help="directory of JSONL files")
    quality.add_argument("--forms", nargs="+", default=FORMS, help='as "int8", or "int4+int8" with a head in int8')
    quality.add_argument("--tasks", nargs="+", default=TASKS)
    quality.add_argument("--contexts", type=int, default=4, help="of each task")
    quality.add_argument("--questions", type=int, default=20, help="of each context")
    quality.add_argument("--max-tokens", type=int, default=64, help="of an answer, at most")
    quality.add_argument("--chat", default="chat", choices=("chat", "cloze"), help="how questions are asked")
    quality.add_argument("--dtype", default="bfloat16")
    quality.add_argument("--device", default=device)
    quality.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    size = parts.add_parser("size")
    size.add_argument("--shape", default="llama-3.1-70b", choices=shapes())
    size.add_argument("--layers", type=int, help="how many, counted from the first")
    size.add_argument("--form", default="int4", choices=("fp8", "int8", "int4"))
    size.add_argument("--tokens", type=int, default=126_000)
    size.add_argument("--ratio", type=float, default=0.3)
    size.add_argument("--segment", type=int, default=16_000)
    size.add_argument("--steps", type=int, default=32)
    size.add_argument("--device", default=device)
    parts.add_parser("show")
    options = parser.parse_args()
    return {"quality": quality_part, "size": size_part, "show": show_part}[options.part](options)


# --- quality


def quality_part(options: argparse.Namespace) -> int:
    begun, facts = time.monotonic(), harness.facts(options.device, options.commit)
    done = {tuple(line[key] for key in KEYS) for line in lines_of(options.results)}
    for path in options.models:
        plain = load(path, PLAIN, options)
        contexts = {(task, n): made for task in options.tasks for n, made in enumerate(asked(plain, task, options))}
        wanted: dict[tuple[str, int], list[Tensor]] = {}  # the pairs that the 16-bit model keeps, by ratio
        for form in (PLAIN, *options.forms):
            left = [key for key in contexts if (path.name, *key, form) not in done]
            if not left and form != PLAIN:
                continue
            model = plain if form == PLAIN else load(path, form, options)
            for key in contexts if form == PLAIN else left:
                if time.monotonic() - begun > options.limit:
                    return UNFINISHED
                example = contexts[key]
                cache = kvzip.score(model, prefill_example(model, example, form=options.chat))
                assert cache.scores is not None
                masks = [torch.stack([*kvzip.keep_mask(cache.scores, ratio)]).cpu() for ratio in RATIOS]
                wanted.setdefault(key, masks)
                if key not in left:
                    continue
                line = {"what": "quality", "model": path.name, "task": key[0], "example": key[1], "weights": form}
                line |= {"tokens": cache.length, "overlap": overlap(masks, wanted[key])}
                line["answers"] = {f"{r:g}": answered(model, cache, r, example, options) for r in ANSWERED}
                harness.record(options.results, [line], facts)
            del model
            release()
    return 0


def load(path: Path, form: str, options: argparse.Namespace) -> kvzip.Model:
    weights, _, head = ("", "", "") if form == PLAIN else form.partition("+")
    how = {"dtype": getattr(torch, options.dtype), "device": options.device}
    return kvzip.load(path, weights=weights or None, head_weights=head or None, **how)


def asked(model: kvzip.Model, task: str, options: argparse.Namespace) -> Iterable[Example]:
    tokenizer = tokenizer_of(model)
    counted = partial(prompts.encode_text, tokenizer)
    request = Request(options.contexts, options.questions, 0, 0, options.data, lambda text: len(counted(text)))
    return examples(task, request)


def overlap(own: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """The share of the wanted pairs that are kept, at each ratio."""
    return [round(float((a & b).sum() / b.sum()), 5) for a, b in zip(own, wanted, strict=True)]


def answered(
    model: kvzip.Model, cache: kvzip.DenseCache, ratio: float, example: Example, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Of each question: nats of the reference answer, and the score of the model's own."""
    small = cache if ratio == 1 else kvzip.compress(cache, ratio)
    nats = [round(one.loglik, 4) for one in gold(model, small, example.questions, form=options.chat)]
    if example.questions[0].metric == "gold":
        return {"loglik": nats}
    said = ask(model, small, [limited(q, options.max_tokens) for q in example.questions], form=options.chat)
    pairs = zip(example.questions, said, strict=True)
    return {"loglik": nats, "score": [evaluate(q.metric, a.text.strip(), q.answers, q.choices) for q, a in pairs]}


def limited(question: Any, tokens: int) -> Any:
    return replace(question, max_tokens=min(question.max_tokens, tokens))


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [x for x in harness.read_lines(results) if x["what"] == "quality"] if results.exists() else []


def show_part(options: argparse.Namespace) -> int:
    """Prints, for each model and form: overlaps, and differences to 16 bits with 95% bootstraps over questions."""
    lines = {tuple(line[key] for key in KEYS): line for line in lines_of(options.results)}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines.values():
        groups.setdefault((line["model"], line["weights"]), []).append(line)
    for (model, form), own in sorted(groups.items()):
        shares = [statistics.fmean(x) for x in zip(*(line["overlap"] for line in own), strict=True)]
        print(f"{model}, {form}: {len(own)} contexts; pairs kept as by 16 bits at", end=" ")
        print(", ".join(f"{ratio:g}: {share:.3f}" for ratio, share in zip(RATIOS, shares, strict=True)))
        for ratio in (f"{r:g}" for r in ANSWERED):
            for measure in ("loglik", "score"):
                pairs = [
                    (a, b)
                    for line in own
                    if measure in line["answers"][ratio] and (base := lines.get((*key_of(line)[:3], PLAIN)))
                    for a, b in zip(line["answers"][ratio][measure], base["answers"][ratio][measure], strict=True)
                ]
                if pairs:
                    print(f"  {measure} at {ratio}: {spread(pairs)}")
    return 0


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[key] for key in KEYS)


def spread(pairs: Sequence[tuple[float, float]], draws: int = 2_000) -> str:
    """The mean, the mean difference, and its 95% interval."""
    values = torch.tensor(pairs, dtype=torch.float64)
    lost = values[:, 0] - values[:, 1]
    drawn = lost[torch.randint(len(lost), (draws, len(lost)), generator=torch.Generator().manual_seed(0))].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{values[:, 0].mean():.3f}, {lost.mean():+.3f} [{low:+.3f}, {high:+.3f}] of {len(pairs)} questions"


# --- size


def size_part(options: argparse.Namespace) -> int:
    facts, cuda = harness.facts(options.device, options.commit), options.device == "cuda"
    how = {"layers": options.layers, "max_length": options.tokens + 4_096, "form": options.form}
    model = random_model(options.shape, device=options.device, **how)
    weights = sum(tensor.nbytes for _, tensor in named_tensors(model.weights))
    read_each_step = weights - (0 if model.config.tied else model.weights.embed.nbytes)
    ids = torch.randint(256, (options.tokens,), generator=torch.Generator().manual_seed(options.tokens))
    line: dict[str, Any] = {"what": "size", "shape": options.shape, "weights": options.form, "tokens": options.tokens}
    line |= {"layers": len(model.config.layers), "ratio": options.ratio, "weights_gb": weights / 1e9}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    read = partial(kvzip.prefill_compressed, model, ids, options.ratio, segment=options.segment)
    cache, line["prefill_s"] = timed(model.device, read)
    size = kvzip.nbytes(cache)
    line |= {"cache_gb": size / 1e9, "kept": cache.kept / cache.total}
    if cuda:
        line["prefill_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    release()
    answer, line["answer_16_s"] = timed(model.device, partial(kvzip.generate, model, cache, "Who?", max_tokens=16))
    line["answer_tokens"] = len(answer.token_ids)
    times = steps_ms(model, cache, options.steps)
    line |= {"ms": statistics.median(times), "spread_ms": times[-1 - len(times) // 10] - times[len(times) // 10]}
    line["floor_ms"] = 1e3 * (read_each_step + size) / READ_BANDWIDTH
    if cuda:
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    harness.record(options.results, [line], facts)
    return 0


def steps_ms(model: kvzip.Model, cache: kvzip.RaggedCache, steps: int) -> list[float]:
    """Milliseconds of decoding steps after eight, in ascending order."""
    decoder = kvzip.Decoder(model, cache, batch=1, tail=256)
    decoder.read([[7] * 30])
    times = []
    for n in range(steps + 8):
        begun = clock(model.device)
        decoder.step()
        if n >= 8:
            times.append(1e3 * (clock(model.device) - begun))
    return sorted(times)


if __name__ == "__main__":
    sys.exit(main())
