"""Times long documents served to many users by vLLM: its own prefix caching beside kvzip's plugin, on one GPU.

    python benchmarks/vllm_serving.py [--shape llama-3.1-8b] [--tokens 32768] [--loads 8x16 8x4 1x32]
                                      [--ways kvzip-0.3 kvzip-1.0 prefix-fp8 prefix] [--limit 150] [--total 1200]

A load is documents x users of each. The ways of kvzip share an engine, each of the others has its own. An engine is a
process, which is ended after `--limit` seconds; after `--total` none is started. Each figure is one JSON line, appended
to benchmarks/results/vllm.jsonl as soon as it is known, and what is there for this commit and GPU is not measured
again: the same command goes on.

Before a load is timed its answers are checked in the same process (`check_documents`, `check_prefixes`). Weights and
documents are random. Figures are of steps in which every user gets a token and nothing is read.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from benchmarks import harness  # noqa: E402
from benchmarks.failures import what_failed  # noqa: E402
from benchmarks.shapes import CONFIGS, shapes  # noqa: E402
from benchmarks.vllm_answers import (  # noqa: E402
    QUESTION,
    check_documents,
    check_prefixes,
    document,
    documents_of,
    runner,
    sampling,
    weights_of,
)
from kvzip.cache import RaggedCache  # noqa: E402
from kvzip.models import Model, translate_config  # noqa: E402

RESULTS = harness.RESULTS / "vllm.jsonl"
ENGINES = {"kvzip": ("kvzip-0.3", "kvzip-1.0"), "prefix-fp8": ("prefix-fp8",), "prefix": ("prefix",)}
WAYS = tuple(way for ways in ENGINES.values() for way in ways)
TIMED = 96  # tokens of the answers that are timed
MEMORY = 0.9  # of the GPU
PAGES = 4 << 30  # bytes of pages with kvzip, which hold questions and answers
GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]  # tokens of steps that are captured, in every way
WORDS = (100, 1000)  # the range of random tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes(), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to try this out")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--loads", nargs="+", default=["8x16", "8x4", "1x32"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--limit", type=int, default=150, help="seconds of one engine")
    parser.add_argument("--total", type=int, default=1200, help="seconds of all engines")
    parser.add_argument("--tested", action="store_true", help="the plugin's tests passed on this machine a moment ago")
    parser.add_argument("--commit", help="named in the results, where git cannot be asked")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--alone", action="store_true", help="one engine, in this process; its figures are printed")
    given = parser.parse_args()
    if given.alone:
        for line in run(given):
            print("RESULT", json.dumps(line), flush=True)
        return 0
    if not given.tested:
        tests = str(harness.ROOT / "tests/vllm_plugin/test_probabilities.py")
        harness.test_or_exit("-p", "no:logging", tests)  # torch logs each step of a compilation
    facts = harness.facts("cuda" if torch.cuda.is_available() else "cpu", given.commit)
    missing, end = 0, time.perf_counter() + given.total
    for ways in ENGINES.values():
        wanted = [way for way in ways if way in given.ways]
        loads = [load for load in given.loads if not all(is_done(given, way, load, facts) for way in wanted)]
        seconds = min(given.limit, end - time.perf_counter())
        if wanted and loads and seconds > 30:
            for line in in_a_process(given, wanted, loads, seconds):
                if not is_done(given, line["way"], f"{line['documents']}x{line['users']}", facts):
                    harness.record(given.out, [line], facts)
        missing += sum(not is_done(given, way, load, facts) for way in wanted for load in given.loads)
    if missing:
        print(f"{missing} figures are missing, see above; the same command measures those alone", flush=True)
    return 1 if missing else 0


def is_done(given: argparse.Namespace, way: str, load: str, facts: dict[str, Any]) -> bool:
    """Whether the results have this figure, of this commit and machine."""
    documents, users = map(int, load.split("x"))
    wanted = {"way": way, "documents": documents, "users": users}
    wanted |= {name: getattr(given, name) for name in ("shape", "layers", "tokens")}
    wanted |= {name: facts.get(name) for name in ("commit", "gpu")}
    lines = harness.read_lines(given.out) if given.out.exists() else []
    return any(all(line.get(name) == value for name, value in wanted.items()) for line in lines)


def in_a_process(
    given: argparse.Namespace, ways: Sequence[str], loads: Sequence[str], seconds: float
) -> Iterator[dict[str, Any]]:
    """The figures of an engine as they come; what it says and how it ended is printed if one is missing."""
    command = [sys.executable, __file__, "--alone", "--shape", given.shape, "--tokens", str(given.tokens)]
    command += ["--loads", *loads, "--ways", *ways]
    command += [] if given.layers is None else ["--layers", str(given.layers)]
    begin, found, told = time.perf_counter(), 0, []
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True)
        timer = threading.Timer(seconds, os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("RESULT "):
                found += 1
                yield json.loads(line.removeprefix("RESULT "))
            elif line.startswith("MARK "):
                print(line.removeprefix("MARK "), end="", flush=True)
            else:
                told.append(line)
        code = child.wait()
        timer.cancel()
        print(f"{' '.join(ways)}: {found} figures in {time.perf_counter() - begin:.0f} s, status {code}", flush=True)
        if code:
            said.seek(0)
            print(what_failed("".join(told)), what_failed(said.read()), sep="\n", flush=True)


def run(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures of the ways that share an engine. Raises AssertionError if answers are wrong."""
    begin = time.perf_counter()
    loads = [tuple(map(int, load.split("x"))) for load in given.loads]
    most, sequences = max(documents for documents, _ in loads), max(a * b for a, b in loads)
    with tempfile.TemporaryDirectory() as directory:
        engine = start(Path(directory), given, given.ways[0], sequences)
    model = weights_of(engine, translate_config(described(given)))
    mark(f"engine started after {time.perf_counter() - begin:.0f} s")
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(*WORDS, (most, given.tokens), generator=draw).tolist()
    questions = torch.randint(*WORDS, (sequences, QUESTION), generator=draw).tolist()
    for way in given.ways:
        caches = documents_for(engine, model, way, most, given.tokens)
        size = page_bytes(engine) * given.tokens if not caches else documents_of(engine).list()[0]["size_bytes"]
        for documents, users in loads:
            if caches:
                requests: list[Any] = [(f"d{n // users}", ids) for n, ids in enumerate(questions[: documents * users])]
                checked = check_documents(engine, model, caches, requests, users)
            else:
                requests = [(None, [*texts[n // users], *ids]) for n, ids in enumerate(questions[: documents * users])]
                checked = check_prefixes(engine, requests, users)
            mark(f"{way} {documents}x{users}: checked after {time.perf_counter() - begin:.0f} s, {checked}")
            steps, wall = decode(engine, requests)
            median = statistics.median(steps)
            yield {
                "way": way,
                "shape": given.shape,
                "layers": given.layers,
                "tokens": given.tokens,
                "documents": documents,
                "users": users,
                "document_bytes": size,
                "documents_that_fit": int(memory() * MEMORY - weight_bytes(engine)) // size,
                "tokens_per_second": round(documents * users / median, 1),
                "step_ms": round(median * 1000, 3),
                "p99_ms": round(sorted(steps)[int(len(steps) * 0.99)] * 1000, 3),
                "wall_s": round(wall, 2),
                "steps": len(steps),
                "checked": checked,
                "vllm": version(),
            }
        for name in caches:
            documents_of(engine).drop(name)
        caches.clear()  # before there are others


def start(directory: Path, given: argparse.Namespace, way: str, sequences: int) -> Any:
    """vLLM with the shape's config and no files of weights, in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "kvzip"}
    from vllm import LLM

    (directory / "config.json").write_text(json.dumps(described(given)), encoding="utf-8")
    room = QUESTION + TIMED + 32
    options: dict[str, Any] = {"max_model_len": room + (0 if way.startswith("kvzip") else given.tokens)}
    if way.startswith("kvzip"):
        options["attention_backend"] = "CUSTOM"
        options["kv_cache_memory_bytes"] = PAGES
    else:
        options["attention_backend"] = "FLASH_ATTN"
        options["gpu_memory_utilization"] = MEMORY
        options["kv_cache_dtype"] = "fp8" if way.endswith("fp8") else "auto"
    return LLM(
        model=str(directory), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", seed=0,
        max_num_seqs=sequences, max_num_batched_tokens=8192, enable_prefix_caching=True, disable_log_stats=False,
        compilation_config={"cudagraph_capture_sizes": [n for n in GRAPHS if n <= max(sequences, 8)]}, **options,
    )  # fmt: skip


def described(given: argparse.Namespace) -> dict[str, Any]:
    """The shape's config.json."""
    raw = json.loads((CONFIGS / f"{given.shape}.json").read_text(encoding="utf-8"))
    return raw | ({} if given.layers is None else {"num_hidden_layers": given.layers})


def mark(text: str) -> None:
    """Says how far a run is."""
    print(f"MARK {text}", flush=True)


def version() -> str:
    """vLLM's."""
    from kvzip.vllm import versions

    return versions.version()


def memory() -> int:
    """Bytes of the GPU; of one that is common, where there is none."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 80 << 30


def page_bytes(engine: Any) -> int:
    """Bytes of one token in vLLM's pages."""
    config = engine.llm_engine.vllm_config
    spec = runner(engine).kv_cache_config.kv_cache_groups[0]
    layers = len(spec.layer_names)
    return spec.kv_cache_spec.page_size_bytes * layers // config.cache_config.block_size


def weight_bytes(engine: Any) -> int:
    """Bytes of the model's parameters."""
    return sum(x.numel() * x.element_size() for x in runner(engine).model.parameters())


def documents_for(engine: Any, model: Model, way: str, count: int, tokens: int) -> dict[str, RaggedCache]:
    """The documents of a way of kvzip, which requests may name; none of other ways."""
    if not way.startswith("kvzip"):
        return {}
    found = {f"d{n}": document(model, tokens, float(way.removeprefix("kvzip-")), seed=n) for n in range(count)}
    for name, cache in found.items():
        documents_of(engine).put(name, cache, file=name, key=f"{way} {name}")
    return found


def decode(engine: Any, requests: Sequence[Any]) -> tuple[list[float], float]:
    """Seconds of each step in which all requests got a token and none was read, and of the whole."""
    inner = engine.llm_engine
    begin = time.perf_counter()
    for n, (name, ids) in enumerate(requests):
        inner.add_request(str(n), {"prompt_token_ids": ids}, sampling(name, TIMED))
    ended, lengths = [], []
    while inner.has_unfinished_requests():
        outputs = inner.step()
        ended.append(time.perf_counter())
        lengths.append(
            min((len(x.outputs[0].token_ids) for x in outputs), default=0) if len(outputs) == len(requests) else 0
        )
    steps = [
        ended[n] - ended[n - 1]
        for n in range(1, len(ended))
        if lengths[n - 1] >= 4 and lengths[n] == lengths[n - 1] + 1  # past the first, when all decode
    ]
    assert len(steps) > TIMED // 2, f"only {len(steps)} steps were of decoding alone"
    return steps, ended[-1] - begin


if __name__ == "__main__":
    sys.exit(main())
