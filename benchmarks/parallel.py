"""Times a model that several GPUs share: sums over ranks, prefill, scoring, decoding steps; and how even the heads are.

    torchrun --nproc-per-node 4 benchmarks/parallel.py [--shape llama-3.1-70b] [--tokens 32768 126000]
    torchrun --nproc-per-node 2 benchmarks/parallel.py --shape llama-3.1-8b --tokens 126000 --only prefill score
    python benchmarks/parallel.py --shape llama-3.1-8b --tokens 126000 --only prefill score    # one GPU, to compare

Every run first checks that both kinds of sums give the same bits on all ranks and are right, and that a decoder's
graphs give what they gave before. Weights are random. Each figure is a JSON line appended to
benchmarks/results/parallel.jsonl; times are those of the slowest rank. Where NVLink multicast is off keep
NCCL_NVLS_ENABLE=0 and TORCH_SYMM_MEM_DISABLE_MULTICAST=1.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import kvzip  # noqa: E402
from benchmarks import harness  # noqa: E402
from benchmarks.shapes import random_model, shapes, with_scores  # noqa: E402
from kvzip.cache import RaggedKV  # noqa: E402
from kvzip.machine import timed  # noqa: E402
from kvzip.models import Model  # noqa: E402
from kvzip.models.weights import named_tensors  # noqa: E402
from kvzip.parallel import Share, Sum, everyone, launch, make_sum  # noqa: E402

RESULTS = harness.RESULTS / "parallel.jsonl"
PARTS = ("sums", "prefill", "score", "decode")
SIZES_KIB = (8, 16, 64, 256, 2048)
READ_BANDWIDTH = 3.07e12  # bytes a second of one H100, as in end_to_end.py
WAYS = ("nccl", "one-shot")
QUESTION = list(range(30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes(), default="llama-3.1-70b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[32_768, 126_000])
    parser.add_argument("--weights", choices=("fp8", "int8", "int4"), help="linear layers in 8 or 4 bits")
    parser.add_argument("--layers", type=int, help="of the shape, from the first: to try the script")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these figures need some")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with launch.joined(launch.local_device(None)) if several else nullcontext() as joined:
        run(options, None if joined is None else joined.share)


def run(options: argparse.Namespace, share: Share | None) -> None:
    """Measures everything; the first rank writes it down."""
    speaks = share is None or share.rank == 0
    facts = harness.facts("cuda", options.commit) if speaks else {}
    device = torch.device("cuda", torch.cuda.current_device())

    def record(line: dict[str, Any]) -> None:
        if speaks:
            ranks = 1 if share is None else share.size
            harness.record(options.results, [{"shape": options.shape, "ranks": ranks, **line}], facts)

    model = random_model(
        options.shape,
        device=device,
        layers=options.layers,
        max_length=max(options.tokens) + 4096,
        form=options.weights,
        group=None if share is None else share.group,
    )
    ways: dict[str, Model] = {"one": model}
    if share is not None:
        sums = {way: make_sum(share, device=device, dtype=model.dtype, how=way) for way in WAYS}
        check_sums(share, sums, device, model.dtype)
        ways = {way: replace(model, add=add) for way, add in sums.items()}
        ways["without"] = replace(model, add=None)  # what is left without them; of a prefill in other blocks
        if "sums" in options.only:
            for line in sums_us(share, sums, model):
                record(line)
    record({"what": "memory", "weights_gb": sum(x.nbytes for _, x in named_tensors(model.weights)) / 1e9})
    for tokens in options.tokens:
        for line in measure(ways, share, tokens, options.only):
            record({"tokens": tokens, **({"weights": options.weights} if options.weights else {}), **line})


# --- sums over ranks


def check_sums(share: Share, sums: dict[str, Sum], device: torch.device, dtype: torch.dtype) -> None:
    """Exits unless sums are those of float64 up to rounding, with the same bits on all ranks."""
    for way, add in sums.items():
        for count in (8, 8192, 40_000, 1 << 20):
            own = torch.randn(count, generator=torch.Generator(device).manual_seed(share.rank), device=device).to(dtype)
            residual = torch.linspace(-1, 1, count, device=device, dtype=dtype)
            exact = torch.stack([x.double() for x in everyone(share, own.cpu())]).sum(0) + residual.double().cpu()
            got = add(own.clone(), residual)().cpu()
            bound = share.size * torch.finfo(dtype).eps * exact.abs().max().item()
            alike = everyone(share, got)
            if not all(torch.equal(x, alike[0]) for x in alike) or (got.double() - exact).abs().max() > bound:
                sys.exit(f"sums by {way} over {count} values are wrong or differ between ranks: nothing is timed")


def sums_us(share: Share, sums: dict[str, Sum], model: Model) -> Iterator[dict[str, Any]]:
    """Microseconds of one sum within a CUDA graph, by size; and of one of a prefill's."""
    ways = {**sums, "one-shot, torch": torch_one_shot(share, model)}
    for kib in SIZES_KIB:
        x = torch.zeros(kib * 512, dtype=torch.bfloat16, device=model.device)
        for way, add in ways.items():
            yield {"what": "sum", "way": way, "kib": kib, "us": graph_us(share, lambda x=x, add=add: add(x)())}
    x = torch.zeros(8192, model.config.hidden_size, dtype=model.dtype, device=model.device)
    times = [1e6 * timed(model.device, lambda: sums["nccl"](x)())[1] for _ in range(10)]
    us = statistics.median(slowest(share, times))
    yield {"what": "sum", "way": "nccl", "kib": x.nbytes >> 10, "us": us, "gb_s": x.nbytes / us / 1e3}


def torch_one_shot(share: Share, model: Model) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
    """torch's own one-shot sum, to compare with: each rank reads all others' memory."""
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(max(SIZES_KIB) * 512, dtype=torch.bfloat16, device=model.device)
    name = share.group.group_name
    symmetric.rendezvous(buffer, group=name)

    def add(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        out = torch.ops.symm_mem.one_shot_all_reduce_copy(buffer[: x.numel()], x, "sum", name)
        return lambda: out

    return add


def graph_us(share: Share, call: Callable[[], object], calls: int = 100, rounds: int = 20) -> float:
    """The median time of a call, of a graph of many; every rank replays as often."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / calls)
    del graph
    return statistics.median(slowest(share, times[3:]))


def slowest(share: Share | None, times: list[float]) -> list[float]:
    """The times of the slowest rank in each round."""
    return [max(round_) for round_ in zip(*everyone(share, times), strict=True)]


# --- the way of a document


def measure(ways: dict[str, Model], share: Share | None, tokens: int, parts: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one figure after the other."""
    first = next(iter(ways.values()))
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(tokens))

    def seconds(call: Callable[[], object]) -> list[float]:
        return slowest(share, [timed(first.device, call)[1] for _ in range(2)])

    if "prefill" in parts:
        line: dict[str, Any] = dict(zip(("first_s", "s"), seconds(partial(kvzip.prefill, first, ids)), strict=True))
        if "without" in ways:
            line["without_sums_s"] = seconds(partial(kvzip.prefill, ways["without"], ids))[1]
        yield {"what": "prefill", **line}
        harness.release()
    cache = kvzip.prefill(first, ids)
    if "score" in parts:
        yield {
            "what": "score",
            "scope": "chunk",
            **dict(zip(("first_s", "s"), seconds(partial(kvzip.score, first, cache)), strict=True)),
        }
    if "decode" not in parts:
        return
    small = kvzip.compress(with_scores(cache, first), 0.3, consume=True)
    del cache
    harness.release()
    read = sum(x.nbytes for name, x in named_tensors(first.weights) if name != "embed")
    floors = [1e3 * (read + kvzip.nbytes(small)) / READ_BANDWIDTH]
    line = {"what": "decode", "ratio": 0.3, "floor_ms": max(everyone(share, floors[0])), **imbalance(share, small)}
    tied = first.weights.unembed.untyped_storage().data_ptr() == first.weights.embed.untyped_storage().data_ptr()
    line["tied"] = bool(tied)
    for way, model in ways.items():
        check_replays(model, small, way)
        line[f"{way}_ms"] = step_ms(share, model, small)
        harness.release()
    if share is not None:
        best = min(WAYS, key=lambda way: line[f"{way}_ms"])
        x = torch.zeros(first.config.hidden_size, dtype=torch.bfloat16, device=first.device)
        add = ways[best].add
        assert add is not None
        measured = {"sum_us": graph_us(share, lambda: add(x)())}
        library = torch_one_shot(share, first)
        measured["library_sum_us"] = graph_us(share, lambda: library(x)())
        count = 2 * len(first.config.layers)
        line |= {
            "best": best,
            **measured,
            "sums": count,
            "allowed_ms": 1.1 * line["floor_ms"] + count * measured["library_sum_us"] / 1e3,
        }
        line["share_of_sums"] = 1 - line["without_ms"] / line[f"{best}_ms"]
    yield line


def step_ms(share: Share | None, model: Model, cache: kvzip.RaggedCache, steps: int = 48) -> float:
    """Milliseconds of a decoding step, by events around each of `steps` after eight."""
    times = harness.step_times(kvzip.Decoder(model, cache, batch=1, tail=256), [QUESTION], steps)
    return statistics.median(slowest(share, times))


def check_replays(model: Model, cache: kvzip.RaggedCache, way: str) -> None:
    """Exits unless a decoder used a second time, when every step is a replay, gives the same tokens on all ranks."""
    found = []
    decoder = kvzip.Decoder(model, cache, batch=1, tail=64)
    for _ in range(2):
        decoder.read([QUESTION])
        tokens = [decoder.fetch()()]
        for _ in range(8):
            decoder.step()
            tokens.append(decoder.fetch()())
        found.append(tokens)
    alike = everyone(model.share, found) if way != "without" else [found]
    if found[0] != found[1] or any(x != alike[0] for x in alike):
        sys.exit(f"decoding with sums by {way} gives other tokens again, or on another rank: nothing is timed")


def imbalance(share: Share | None, cache: kvzip.RaggedCache) -> dict[str, float]:
    """How many more rows than the mean the rank with most has, as a factor: in a layer on average, in the worst layer,
    and in all layers together."""
    rows = [len(layer.positions) for layer in cache.context if isinstance(layer, RaggedKV)]
    layers = list(zip(*everyone(share, rows), strict=True))
    factors = [max(each) * len(each) / sum(each) for each in layers]
    totals = [sum(each) for each in zip(*layers, strict=True)]
    return {
        "imbalance_mean": statistics.mean(factors),
        "imbalance_worst": max(factors),
        "imbalance_total": max(totals) * len(totals) / sum(totals),
    }


if __name__ == "__main__":
    main()
