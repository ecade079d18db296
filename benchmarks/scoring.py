"""Times scoring in both scopes, and a context that is larger than memory from tokens to answer.

    python benchmarks/scoring.py score                            # both scopes at 32,768 and 126,000 tokens
    python benchmarks/scoring.py stream --tokens 1000000          # prefill_compressed at ratio 0.3, then 16 tokens
    python benchmarks/scoring.py stream --upto 500000 --state DIR # stops there and saves
    python benchmarks/scoring.py profile                          # kernels of a scoring pass

Random weights of a published shape. Each figure is one JSON line appended to benchmarks/results/scoring.jsonl.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import kvzip
from benchmarks import harness
from benchmarks.harness import release
from benchmarks.shapes import random_model
from kvzip.machine import clock, timed
from kvzip.streaming import checkpoints, prefill, segments

RESULTS = harness.RESULTS / "scoring.jsonl"


STAGES = (
    (segments, "_prefill", "prefill_s"),
    (segments, "score_chunks", "score_s"),
    (segments, "_choose", "select_s"),
    (prefill, "pack_", "pack_s"),
    (prefill, "save", "save_s"),
    (checkpoints, "read_cache", "load_s"),
)
"""Functions of `prefill_compressed` that are timed."""


class Reached(Exception):
    pass


def ids_of(count):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(0))


def say(arguments, **line):
    harness.record(arguments.results, [{"shape": arguments.shape, **line}], harness.facts("cuda", arguments.commit))


def score_part(model, arguments):
    for tokens in arguments.lengths:
        cache, prefill_s = timed(model.device, partial(kvzip.prefill, model, ids_of(tokens)))
        for scope in ("chunk", "context"):
            warm = kvzip.prefill(model, ids_of(4_500), progress=None)
            kvzip.score(model, warm, scope=scope)  # compiles, and plans the shapes of all but the past
            del warm
            times = []
            for _ in range(arguments.repeats if scope == "chunk" or tokens < 50_000 else 1):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                scored, score_s = timed(model.device, partial(kvzip.score, model, cache, scope=scope))
                times.append(score_s)
                peak = torch.cuda.max_memory_allocated() - before
            say(
                arguments,
                what="score",
                scope=scope,
                tokens=tokens,
                prefill_s=prefill_s,
                s=min(times),
                spread_s=max(times) - min(times),
                extra_peak_gib=peak / 2**30,
                nan=bool(scored.scores.values.isnan().any()),
            )
        del cache, scored
        release()


def profile_part(model, arguments):
    from torch.profiler import ProfilerActivity, profile

    cache = kvzip.prefill(model, ids_of(8_000))
    kvzip.score(model, cache, scope="chunk")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        kvzip.score(model, cache, scope="chunk")
        torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=25))


def stream_part(model, arguments):
    weights = torch.cuda.memory_allocated()
    state = None if arguments.state is None else Path(arguments.state) / "stream.kvz"
    ids = ids_of(arguments.tokens)
    stages, last = {}, [None]

    def noted(stage, function):
        def run(*args, **kwargs):
            result, s = timed(model.device, partial(function, *args, **kwargs))
            stages[stage] = stages.get(stage, 0.0) + s
            return result

        return run

    # a synchronisation on each side of a stage: three a segment
    for module, name, stage in STAGES:
        setattr(module, name, noted(stage, getattr(module, name)))

    def progress(done, total):
        now = clock(model.device)
        if last[0] is not None and (done // 16_000) % 8 == 0:
            say(
                arguments,
                what="stream segment",
                done=done,
                segment_s=now - last[0],
                peak_gib=(torch.cuda.max_memory_allocated() - weights) / 2**30,
            )
        last[0] = now
        if done >= arguments.upto:
            raise Reached

    options = {"share": arguments.share, "checkpoint": state, "progress": progress}
    kvzip.prefill_compressed(model, ids[:40_000], 0.3, share=arguments.share)  # compiles
    stages.clear()
    release()
    torch.cuda.reset_peak_memory_stats()
    begin = clock(model.device)
    full = 131_072 * arguments.tokens
    allowed = arguments.ratio * full + 16_000 * 131_072 + 2 * 2**30
    try:
        cache = kvzip.prefill_compressed(model, ids, arguments.ratio, **options)
    except Reached:
        say(
            arguments,
            what="stream stopped",
            tokens=arguments.upto,
            s=clock(model.device) - begin,
            **stages,
            peak_gib=(torch.cuda.max_memory_allocated() - weights) / 2**30,
            allowed_gib=allowed / 2**30,
        )
        return
    total_s = clock(model.device) - begin
    peak = torch.cuda.max_memory_allocated() - weights
    ask = partial(kvzip.generate, model, cache, "What is it about?", max_tokens=16)
    (answer, first_s), (again, again_s) = timed(model.device, ask), timed(model.device, ask)
    say(
        arguments,
        what="stream",
        tokens=arguments.tokens,
        ratio=arguments.ratio,
        share=arguments.share,
        s=total_s,
        **stages,
        kept=cache.kept,
        expected=int(arguments.ratio * cache.total),
        cache_gb=kvzip.nbytes(cache) / 1e9,
        peak_gib=peak / 2**30,
        allowed_gib=allowed / 2**30,
        decode_16_first_s=first_s,
        decode_16_s=again_s,
        answer=len(answer.token_ids),
        same=answer == again,
        finite=all(bool(kv.k.isfinite().all()) for kv in cache.context),
    )
    assert cache.kept == int(arguments.ratio * cache.total) and peak <= allowed, (peak, allowed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("part", choices=("score", "stream", "profile"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 126_000])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--share", default="running", choices=("segment", "running", "final"))
    parser.add_argument("--upto", type=int, default=1 << 40)
    parser.add_argument("--state", default=None)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=None)
    arguments = parser.parse_args()
    model = random_model(arguments.shape, layers=arguments.layers, max_length=1_200_000)
    {"score": score_part, "stream": stream_part, "profile": profile_part}[arguments.part](model, arguments)


if __name__ == "__main__":
    main()
