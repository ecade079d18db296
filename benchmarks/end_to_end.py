"""Times the whole way from a context to answers: prefill, score, compress, read a question, decode; with peak memory.

    python benchmarks/end_to_end.py [--shape llama-3.1-8b ...] [--tokens 32768 126000] [--only decode ...]
    python benchmarks/end_to_end.py --model DIRECTORY      # real weights
    python benchmarks/end_to_end.py --render               # the latest lines to docs/speed.md and its plot

Every run first checks that the paths it times agree: kernels against plain PyTorch by the project's accuracy rule, the
CUDA graph against step by step, a batch against each question alone. Weights of a named shape are random. Each figure
is one JSON line appended to benchmarks/results/end-to-end.jsonl.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import kvzip  # noqa: E402
from accuracy import assert_as_accurate  # noqa: E402
from benchmarks import harness  # noqa: E402
from benchmarks.harness import ROOT, release  # noqa: E402
from benchmarks.linear import FORMS  # noqa: E402
from benchmarks.shapes import random_model, shapes, with_scores  # noqa: E402
from kvzip.attention import decode_attend  # noqa: E402
from kvzip.cache import all_ragged, empty_tail  # noqa: E402
from kvzip.machine import clock, timed  # noqa: E402
from kvzip.models import Model, forward, logits  # noqa: E402

RESULTS = harness.RESULTS / "end-to-end.jsonl"
PARTS = ("check", "prefill", "decode", "batch", "question", "memory", "first", "ratios")
QUESTION = 30  # tokens
READ_BANDWIDTH = 3.07e12  # bytes a second of one H100, a sum over 2 GiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=shapes(), default=["llama-3.1-8b"])
    parser.add_argument("--model", type=Path, help="an HF directory: real weights instead of a shape")
    parser.add_argument("--tokens", nargs="+", type=int, default=[32_768, 126_000])
    parser.add_argument("--weights", choices=FORMS, help="linear layers in 8 or 4 bits; with rounded inputs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="draw the latest lines, write their table, and stop")
    options = parser.parse_args()
    if options.render:
        latest = read_latest(options.results)
        plot(latest, ROOT / "docs" / "end-to-end.png")
        render_table(latest, ROOT / "docs" / "speed.md")
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these figures need one")
    facts = harness.facts("cuda", options.commit)
    names = [str(options.model)] if options.model else options.shape
    for name in names:
        if "check" in options.only and not options.model:
            check_paths(name, options.weights)
        model = (
            kvzip.load(options.model, weights=options.weights)
            if options.model
            else random_model(name, max_length=max(options.tokens) + 4096, form=options.weights)
        )
        for tokens in options.tokens:
            for line in measure(model, tokens, options.only):
                line |= {"weights": options.weights} if options.weights else {}
                harness.record(options.results, [{"shape": Path(name).name, "tokens": tokens, **line}], facts)
        del model
        release()


# --- what is measured


def measure(model: Model, tokens: int, parts: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one figure after the other, each as a dict with `what` and its values."""
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(tokens))
    read, times = partial(kvzip.prefill, model, ids), []
    if "prefill" in parts:  # the first plans kernels for shapes that it has not seen
        cold, *times = (timed(model.device, read)[1] for _ in range(2))
    release()
    weights = torch.cuda.memory_allocated()
    if "memory" in parts:
        torch.cuda.reset_peak_memory_stats()
        cache, read_s = timed(model.device, read)
        times.append(read_s)
        dense_bytes = kvzip.nbytes(cache)
        scored = kvzip.score(model, cache, scope="chunk")
        small = kvzip.compress(scored, 0.3, consume=True)
        peak = torch.cuda.max_memory_allocated() - weights - dense_bytes
        kept_bytes = kvzip.nbytes(small)
        yield {"what": "memory", "peak_gib": peak / 2**30, "full_gb": dense_bytes / 1e9, "kept_gb": kept_bytes / 1e9}
        del scored, small, cache
        release()
    cache, read_s = timed(model.device, read)
    times.append(read_s)
    if "prefill" in parts:
        yield {"what": "prefill", "s": statistics.median(times), "spread_s": max(times) - min(times), "first_s": cold}
    cache = with_scores(cache, model)
    if "decode" in parts:
        yield decoding(model, cache, 1.0)
    if "question" in parts:
        yield {"what": "question", "ratio": 1.0, **question_ms(model, cache)}
    if "ratios" in parts:
        for ratio in (0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            small = kvzip.compress(cache, ratio)
            yield decoding(model, small, ratio)
            del small
    small = kvzip.compress(cache, 0.3)
    if "decode" in parts:
        yield decoding(model, small, 0.3)
    if "batch" in parts:
        yield {"what": "decode", "ratio": 0.3, "questions": 32, **step_ms(model, small, 32)}
    if "question" in parts:
        yield {"what": "question", "ratio": 0.3, **question_ms(model, small)}
    if "first" in parts:
        yield {"what": "first token", **first_token_ms(model, cache)}
    del cache, small
    release()


def decoding(model: Model, cache: kvzip.DenseCache | kvzip.RaggedCache, ratio: float) -> dict[str, Any]:
    size = kvzip.nbytes(cache) / 1e9
    return {"what": "decode", "ratio": ratio, "questions": 1, "gb": size, **step_ms(model, cache, 1)}


def questions(count: int, tokens: int = QUESTION) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (count, tokens), generator=generator).tolist()


def step_ms(model: Model, cache: kvzip.DenseCache | kvzip.RaggedCache, batch: int, steps: int = 48) -> dict[str, float]:
    """Milliseconds of a decoding step, by events around each of `steps` after eight."""
    times = sorted(harness.step_times(kvzip.Decoder(model, cache, batch=batch, tail=256), questions(batch), steps))
    return {"ms": statistics.median(times), "spread_ms": times[-len(times) // 10] - times[len(times) // 10]}


def question_ms(model: Model, cache: kvzip.DenseCache | kvzip.RaggedCache) -> dict[str, float]:
    """Milliseconds to read a question with a decoder used before, up to its first token on the host."""
    decoder = kvzip.Decoder(model, cache, batch=1, tail=256)

    def read() -> None:
        decoder.read(questions(1))
        decoder.fetch()()

    read()
    times = [1e3 * timed(model.device, read)[1] for _ in range(7)]
    return {"question_tokens": QUESTION, "ms": statistics.median(times), "spread_ms": max(times) - min(times)}


def first_token_ms(model: Model, cache: kvzip.DenseCache) -> dict[str, float]:
    """Milliseconds from `compress` called to the first token, and with the graph captured, kernels warm."""
    times = []
    for _ in range(4):
        start = clock(model.device)
        small = kvzip.compress(cache, 0.3)
        packed = clock(model.device)
        decoder = kvzip.Decoder(model, small, batch=1, tail=256)
        decoder.read(questions(1))
        decoder.fetch()()
        first = clock(model.device)
        decoder.step()
        decoder.step()
        decoder.fetch()()
        times.append([1e3 * (t - start) for t in (packed, first, clock(model.device))])
        del small, decoder
    packed, first, captured = (statistics.median(column[1:]) for column in zip(*times, strict=True))
    return {"compress_ms": packed, "ms": first, "with_graph_and_two_steps_ms": captured}


# --- agreement before timing


def check_paths(name: str, form: str | None = None) -> None:
    """Exits unless the fast paths give what the plain ones give, on two to six layers of the shape."""
    layers = 6 if "gemma" in name else 2  # a global layer among them
    model = random_model(name, layers=layers, max_length=8192, form=form)
    exact = replace(model, weights=copied(model.weights, torch.float64), dtype=torch.float64)
    ids = torch.randint(256, (1_500,), generator=torch.Generator().manual_seed(0))
    small = kvzip.compress(with_scores(kvzip.prefill(model, ids), model), 0.3)
    wide = replace(small, context=copied(small.context, torch.float64))
    for batch, tokens in ((1, 1), (1, QUESTION), (3, 1)):
        rows = torch.tensor(questions(batch, tokens), device=model.device)

        def run(model: Model, cache: kvzip.RaggedCache, rows: torch.Tensor = rows) -> torch.Tensor:
            tail = empty_tail(cache.context, rows.shape[0], 64, dtype=model.dtype)
            positions = torch.arange(cache.context_length, cache.context_length + rows.shape[1], device=model.device)
            attend = decode_attend(model.config, all_ragged(cache.context), tail)
            with torch.no_grad():
                return logits(model, forward(model, rows, positions, attend)[:, -1])

        fast = run(model, small)
        with backend("reference"):
            assert_as_accurate(fast, run(exact, wide), run(model, small))
    del exact, wide
    ids_by_step = []
    decoder = kvzip.Decoder(model, small, batch=3, tail=64)
    for _ in range(2):  # the second time every step is a replay
        decoder.read(questions(3))
        ids_by_step.append([decoder.fetch()()])
        for _ in range(12):
            decoder.step()
            ids_by_step[-1].append(decoder.fetch()())
    if ids_by_step[0] != ids_by_step[1]:
        sys.exit("the second use of a decoder gives other tokens than the first: nothing is timed")
    del decoder
    release()
    print(f"{name}: paths agree", flush=True)


def copied(value: Any, dtype: torch.dtype) -> Any:
    """A structure with its floating tensors in another dtype."""
    from kvzip.cache.caches import map_tensors

    return map_tensors(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


@contextmanager
def backend(name: str) -> Iterator[None]:
    before = os.environ.get("KVZIP_BACKEND")
    os.environ["KVZIP_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("KVZIP_BACKEND") if before is None else os.environ.update(KVZIP_BACKEND=before)


# --- plot and table


def read_latest(results: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The latest line of each figure, by shape, tokens, what it is, ratio and questions; `line` is its number.

    Those of weights in 8 and 4 bits are left out.
    """
    latest = {}
    for record in harness.read_lines(results):
        if record.get("weights"):
            continue
        key = (record["shape"], record["tokens"], record["what"], record.get("ratio"), record.get("questions"))
        latest[key] = record
    return latest


def plot(latest: dict[tuple[Any, ...], dict[str, Any]], path: Path) -> None:
    """Draws milliseconds a token and cache size against the ratio kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape, weights = "llama-3.1-8b", 15.0e9
    steps = {(n, ratio): r for (s, n, what, ratio, q), r in latest.items() if (s, what, q) == (shape, "decode", 1)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for color, tokens in zip(("tab:blue", "tab:orange"), sorted({tokens for tokens, _ in steps}), strict=False):
        ratios = sorted(ratio for n, ratio in steps if n == tokens)
        label = f"{tokens:,} tokens"
        axes[0].plot(ratios, [steps[tokens, r]["ms"] for r in ratios], "o-", color=color, label=f"kvzip, {label}")
        floor = [1e3 * (weights + r * tokens * 131_072) / READ_BANDWIDTH for r in ratios]
        axes[0].plot(ratios, floor, ":", color=color, label=f"floor (bytes at 3.07 TB/s), {label}")
        sizes = {r: steps[tokens, r]["gb"] for r in ratios if "gb" in steps[tokens, r]}
        memory = latest.get((shape, tokens, "memory", None, None))
        if memory is not None:
            sizes |= {0.3: memory["kept_gb"], 1.0: memory["full_gb"]}
        axes[1].plot(sorted(sizes), [sizes[r] for r in sorted(sizes)], "o-", color=color, label=label)
    axes[0].set(xlabel="ratio of pairs kept", ylabel="ms per token", ylim=(0, None), title="Decoding one question")
    axes[1].set(xlabel="ratio of pairs kept", ylabel="GB", ylim=(0, None), title="Cache")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle("Llama-3.1-8B shape, bfloat16, one H100")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def render_table(latest: dict[tuple[Any, ...], dict[str, Any]], page: Path) -> None:
    """Writes the table between its markers in a page, each figure linked to its line."""
    columns = [
        ("prefill", "prefill", None, None, "s", 1, " s"),
        ("ms/token, full", "decode", 1.0, 1, "ms", 1, ""),
        ("ms/token, 0.3", "decode", 0.3, 1, "ms", 1, ""),
        ("ms/step, 0.3, 32 questions", "decode", 0.3, 32, "ms", 1, ""),
        ("question of 30, 0.3", "question", 0.3, None, "ms", 1, " ms"),
        ("first token from compress", "first token", None, None, "ms", 0, " ms"),
        ("beyond weights and full cache", "memory", None, None, "peak_gib", 1, " GiB"),
    ]
    rows = [
        "| shape | tokens | " + " | ".join(name for name, *_ in columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for shape, tokens in dict.fromkeys(key[:2] for key in latest):
        cells = []
        for _, what, ratio, questions, field, digits, unit in columns:
            record = latest.get((shape, tokens, what, ratio, questions))
            link = None if record is None else f"../benchmarks/results/end-to-end.jsonl#L{record['line']}"
            cells.append("-" if record is None else f"[{record[field]:.{digits}f}{unit}]({link})")
        rows.append(f"| {shape} | {tokens:,} | " + " | ".join(cells) + " |")
    harness.write_between(page, "end-to-end", "\n".join(rows))


if __name__ == "__main__":
    main()
