"""Times every op beside the alternatives that are installed, and appends one JSON line for each figure.

    python benchmarks/ops.py [--only select prune] [--commit HASH] [--flex] [--workers 12]
    python benchmarks/ops.py --table        # renders the latest lines into docs/speed.md, some of them into README.md

It runs the ops' tests on the GPU first and times nothing if one fails. Variants of a case take turns, from CUDA
graphs where they can be captured ("graph" in a line; others are launched one by one, "eager"). The least time for a
case is that of its bytes at the bandwidth, or its products at the rate, measured in the same run.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness, linear, peers
from benchmarks.harness import ROOT, Variant, record, test_or_exit, time_variants
from benchmarks.layouts import Batch, starts_of
from kvzip import ops

RESULTS = harness.RESULTS / "ops.jsonl"
COLD_BYTES = 256 * 2**20  # inputs of a cold case rotate over more than this, several times the L2
LENGTHS = {  # rows of 8 heads that hold 0.3 of the pairs
    "0.3 of 131,072, skewed": [40315, 54085, 19669, 21874, 30754, 47293, 40003, 60577],
    "0.3 of 131,072, even": [39321] * 8,
    "0.3 of 131,072, one head has half": [157285] + [22469] * 7,
    "0.3 of 32,768, skewed": [10078, 13521, 4917, 5468, 7688, 11823, 10000, 15144],
}
HEADS, QUERY_HEADS, WIDTH = 8, 32, 128  # Llama-3.1-8B

Case = tuple[str, dict[str, Variant], dict[str, float]]  # name, variants, and the least bytes and products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), default=sorted(BENCHMARKS))
    parser.add_argument("--cases", help="only cases whose names have this in them; no tests are run before")
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--flex", action="store_true", help="also compile and time FlexAttention")
    parser.add_argument("--launches", action="store_true", help="also time every launch of the quantized linear layer")
    parser.add_argument("--workers", type=int, default=1, help="processes that run the tests, with pytest-xdist")
    parser.add_argument("--table", action="store_true", help="render the latest lines into the pages and stop")
    options = parser.parse_args()
    if options.table:
        render_table(options.results, ROOT / "docs" / "speed.md")
        render_table(options.results, ROOT / "README.md", block="speed", cases=IN_README)
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device: timings need one")
    files = [name for op in options.only for name in (linear.TESTS if op == "linear" else (op, f"{op}_*"))]
    tests = [str(path) for name in files for path in sorted((ROOT / "tests" / "ops").glob(f"test_{name}.py"))]
    if not options.cases:
        test_or_exit("-m", "gpu", *tests, workers=options.workers)
    facts = harness.facts("cuda", options.commit)
    floors = measure_floors()
    lines = [{"op": "floor", "case": what, "variant": unit, "value": round(n, 3)} for (what, unit), n in floors.items()]
    record(options.results, show(lines), facts, show=False)
    for op in options.only:
        for case, variants, least in BENCHMARKS[op](options):
            if options.cases and options.cases not in case:
                continue
            least_us = max(
                least.get("bytes", 0) / floors["copy" if least.get("copies") else "read", "TB/s"] / 1e6,
                least.get("products", 0) / floors["product", "TFLOP/s"] / 1e6,
            )
            lines = [
                {"op": op, "case": case, "variant": name, **figures, "floor_us": round(least_us, 2)}
                | {"fraction_of_floor": round(least_us / figures["median_us"], 3)}
                for name, figures in time_variants(variants).items()
            ]
            record(options.results, show(lines), facts, show=False)
            torch.cuda.empty_cache()


def measure_floors() -> dict[tuple[str, str], float]:
    """The bandwidths and the rate that this device reaches; of two ways to copy the faster one counts."""
    source, target = torch.randn(2**29, device="cuda"), torch.empty(2**29, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls = {
        "copy": [lambda: target.copy_(source)],  # the driver's, slower in a graph than a kernel
        "copy by a kernel": [lambda: torch.mul(source, 1, out=target)],
        "read": [source.sum],
        "product": [lambda: a @ b],
    }
    us = {name: figures["median_us"] for name, figures in time_variants(calls).items()}
    size = source.nbytes
    return {
        ("copy", "TB/s"): 2 * size / min(us["copy"], us["copy by a kernel"]) / 1e6,
        ("read", "TB/s"): size / us["read"] / 1e6,
        ("product", "TFLOP/s"): 2 * 8192**3 / us["product"] / 1e6,
    }


def show(lines: list[dict]) -> list[dict]:
    """The lines, printed."""
    for line in lines:
        what = line.get("value", line.get("median_us"))
        share = f"{line['fraction_of_floor']:.0%} of the floor" if line.get("fraction_of_floor") else ""
        print(f"{line['op']:9} {line['case']:52} {line['variant']:28} {what:10.2f} {share}", flush=True)
    return lines


def bench_select(options: argparse.Namespace):
    scores = torch.randn(32, HEADS, 131_072, device="cuda").mul_(3).exp_()
    flat, count = scores.flatten(), int(0.3 * scores.numel())
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    least = {"bytes": scores.nbytes + scores.numel()}
    yield (
        "32 x 8 x 131,072 fp32",
        {
            "kvzip": [lambda: ops.select(scores, ratio=0.3, nan=flag)],
            "torch.topk": [lambda: torch.topk(flat, count, sorted=False)],
            "torch.sort": [lambda: torch.sort(flat, descending=True, stable=True)],
            "torch.kthvalue": [lambda: torch.kthvalue(flat, flat.numel() - count)],
        },
        least,
    )
    equal, rounded = torch.full_like(scores, 0.5), scores.bfloat16().float()
    others = {"32 layers in a list": list(scores), "all equal": equal, "many ties (bf16 values)": rounded}
    for name, given in others.items():
        yield name, {"kvzip": [lambda given=given: ops.select(given, ratio=0.3, nan=flag)]}, least
    yield "uniform, 256 heads", {"kvzip": [lambda: ops.select_uniform(scores, ratio=0.3, nan=flag)]}, least


def bench_likeliest(options: argparse.Namespace):
    """The logits of a step, which are still in the L2 when their token is chosen."""
    for rows in (1, 32):
        scores = torch.randn(rows, 128_256, device="cuda", dtype=torch.bfloat16)
        alone = {"torch.argmax": [lambda scores=scores: scores.argmax(-1)]}
        own: dict[str, Variant] = {"kvzip": [lambda scores=scores: ops.likeliest(scores)]}
        yield f"{rows} x 128,256 bf16", own | alone, {"bytes": scores.nbytes}


def bench_prune(options: argparse.Namespace):
    for width in (WIDTH, 80):
        k, v = (torch.randn(HEADS, 131_072, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        keep = torch.rand(HEADS, 131_072, device="cuda") < 0.3
        total, index = int(keep.sum()), keep.flatten().nonzero()[:, 0]
        rows_k, rows_v = k.flatten(0, 1), v.flatten(0, 1)
        yield (
            f"[8, 131072, {width}] bf16, 0.3 kept",
            {
                "kvzip": [lambda k=k, v=v, keep=keep, total=total: ops.prune(k, v, keep, total=total)],
                "k[keep], v[keep]": [lambda k=k, v=v, keep=keep: (k[keep], v[keep])],
                "index_select, indices given": [
                    lambda k=rows_k, v=rows_v, index=index: (k.index_select(0, index), v.index_select(0, index))
                ],
            },
            {"bytes": 4 * total * width * 2 + keep.numel() + 4 * total, "copies": True},
        )


def bench_quantize(options: argparse.Namespace):
    from kvzip.ops.quantize import dequantize_reference, quantize_reference

    x = torch.randn(sum(LENGTHS["0.3 of 131,072, skewed"]), WIDTH, device="cuda", dtype=torch.bfloat16)
    for bits in (8, 4):
        q = ops.quantize(x, bits=bits)
        least = {"bytes": x.nbytes + q.codes.nbytes + q.scale.nbytes + q.zero.nbytes, "copies": True}
        yield (
            f"{len(x):,} rows, int{bits}",
            {
                "kvzip": [lambda bits=bits: ops.quantize(x, bits=bits)],
                "plain PyTorch": [lambda bits=bits: quantize_reference(x, bits=bits)],
            },
            least,
        )
        yield (
            f"{len(x):,} rows, int{bits}, back",
            {
                "kvzip": [lambda q=q: ops.dequantize(q, dtype=torch.bfloat16)],
                "plain PyTorch": [lambda q=q: dequantize_reference(q, dtype=torch.bfloat16)],
            },
            least,
        )


def packed(k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, bits: tuple[int, int]) -> tuple[Any, Any]:
    """Keys and values as caches have them, see `kvzip.cache.rows.pack`."""
    keys = (ops.quantize_turned if bits[0] < 8 else ops.quantize)(k, bits=bits[0], offsets=offsets)
    return keys, (ops.quantize_turned if bits[1] < 4 else ops.quantize)(v, bits=bits[1])


def bench_quantize_turned(options: argparse.Namespace):
    """Keys and values of all layers of the 8B shape, as `compress` packs them, and the parts of that."""
    lengths, layers = [37_800] * HEADS, 32
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    k, v = (torch.randn(sum(lengths), WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    queries = torch.randn(layers, HEADS, 4 * WIDTH, WIDTH, device="cuda")
    asked = queries.mT @ queries
    known = ops.measure_channels_turned(k, offsets, bits=4)
    spreads = known.spread.expand(layers, -1, -1).contiguous()
    shaped = ops.shape_feedback(asked[0], known.spread)

    def channels() -> list[Any]:
        return [ops.measure_channels_turned(k, offsets, bits=4) for _ in range(layers)]

    def keys(own: Sequence[Any], feedback: Sequence[Any]) -> None:
        for one, more in zip(own, feedback, strict=True):
            ops.quantize_turned_ahead(k, bits=4, offsets=offsets, channels=one, feedback=more)

    def values() -> None:
        for _ in range(layers):
            ops.quantize_turned_ahead(v, bits=2)

    def whole() -> None:
        own = channels()
        keys(own, ops.shape_feedback(asked, torch.stack([one.spread for one in own])).unbind())
        values()

    def to_the_nearest() -> None:
        keys(channels(), [None] * layers)
        values()

    least = {"bytes": layers * (k.nbytes + v.nbytes + sum(lengths) * (WIDTH * 6 // 8 + 8)), "copies": True}
    variants: dict[str, Variant] = {"kvzip": [whole], "without feedback": [to_the_nearest]}
    yield "0.3 of 126,000 tokens, 32 layers, keys in 4 and values in 2 bits", variants, least
    parts: dict[str, Variant] = {
        "channels": [channels],
        "moments to feedback": [lambda: ops.shape_feedback(asked, spreads)],
        "moments to feedback, one by one": [
            lambda: [ops.shape_feedback(*both) for both in zip(asked, spreads, strict=True)]
        ],
        "keys": [lambda: keys([known] * layers, [shaped] * layers)],
        "keys, without feedback": [lambda: keys([known] * layers, [None] * layers)],
        "values": [values],
    }
    yield "0.3 of 126,000 tokens, 32 layers, parts", parts, {}


def bench_decode(options: argparse.Namespace):
    for name, lengths in LENGTHS.items():
        yield decode_case(name, lengths, options)
    skewed = LENGTHS["0.3 of 131,072, skewed"]
    yield decode_case("0.3 of 131,072, skewed, 32 questions", skewed, options, questions=32)
    for name, bits in (("int8", (8, 8)), ("int4", (4, 4)), ("int4 and int2", (4, 2))):
        yield decode_case(f"0.3 of 131,072, skewed, {name}", skewed, options, bits=bits)
    for name, bits in (("int4", (4, 4)), ("int4 and int2", (4, 2))):
        yield decode_case(f"0.3 of 131,072, skewed, 32 questions, {name}", skewed, options, bits=bits, questions=32)
    yield decode_case("0.3 of 131,072, skewed, D 256, 16/8 heads", skewed, options, width=256, group=2)
    yield decode_case("0.3 of 131,072, skewed, 512 new tokens", skewed, options, tokens=512)
    yield many_contexts_case("8 contexts of 0.3 of 32,768, 16 questions each", LENGTHS["0.3 of 32,768, skewed"])
    k, v = (torch.randn(1, HEADS, 131_072, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, QUERY_HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    dense: dict[str, Variant] = {"SDPA": [lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)]}
    yield "full cache of 131,072 (nothing removed)", dense, {"bytes": 2 * k.nbytes}


def decode_case(
    name: str,
    lengths: list[int],
    options: argparse.Namespace,
    *,
    questions: int = 1,
    tokens: int = 1,
    bits: tuple[int, int] | None = None,
    width: int = WIDTH,
    group: int = QUERY_HEADS // HEADS,
) -> Case:
    """Decoding over one layer's ragged heads, over as many copies of it as keep the cache cold."""
    n, scale = sum(lengths), width**-0.5
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    schedule = ops.decode_schedule(offsets)
    q = torch.randn(questions, HEADS * group, tokens, width, device="cuda", dtype=torch.bfloat16)
    size = n * width * sum(bits or (16, 16)) // 8
    copies = max(2, math.ceil(COLD_BYTES / size))
    caches = []
    for _ in range(copies):
        k, v = (torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        caches.append((k, v) if bits is None else packed(k, v, offsets, bits))
    decode = partial(ops.decode, q, offsets=offsets, scale=scale, schedule=schedule)
    variants: dict[str, Variant] = {
        "kvzip": [partial(decode, k=k, v=v) for k, v in caches],
        "kvzip, with a bias": [partial(decode, k=k, v=v, bias=torch.randn(n, device="cuda").half()) for k, v in caches],
    }
    if bits is not None:
        size = sum(getattr(x, part).nbytes for x in caches[0] for part in ("codes", "scale", "zero"))
        plain = [  # two are cold too
            (ops.dequantize(k, dtype=torch.bfloat16, offsets=offsets), ops.dequantize(v, dtype=torch.bfloat16))
            for k, v in caches[:2]
        ]
        variants["kvzip, bf16"] = [partial(decode, k=k, v=v) for k, v in plain]
    else:
        others = peers.available(peers.decode_peers(q, caches, lengths, scale, flex=options.flex))
        variants |= peers.agreeing(others, variants["kvzip"][0]()[0])
    return name, variants, {"bytes": size, "products": 4 * questions * group * tokens * n * width}


def many_contexts_case(name: str, lengths: list[int], contexts: int = 8, questions: int = 16, tail: int = 128) -> Case:
    """Decoding a token of each of `questions` questions over each of several contexts, with tails of `tail` tokens."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    rows = contexts * sum(lengths)
    batch = Batch(
        q=make(contexts, questions, QUERY_HEADS, WIDTH),
        contexts=[(make(rows, WIDTH), make(rows, WIDTH)) for _ in range(max(2, COLD_BYTES // (4 * rows * WIDTH) + 1))],
        lengths=[lengths] * contexts,
        tails=(make(contexts, questions, HEADS, tail, WIDTH), make(contexts, questions, HEADS, tail, WIDTH)),
        scale=WIDTH**-0.5,
    )
    size = 4 * rows * WIDTH + sum(x.nbytes for x in batch.tails)
    products = 4 * questions * QUERY_HEADS * WIDTH * (rows // HEADS + contexts * tail)
    ours = flat_rows(batch)
    expected = ours["kvzip"][0]().view_as(batch.q)
    others = peers.agreeing(peers.available(peers.batch_peers(batch)), expected)
    return name, {**ours, **others}, {"bytes": size, "products": products}


def flat_rows(batch: Batch) -> dict[str, Variant]:
    """`ops.decode_rows` of all questions, with a plan made before as a step makes it for all its layers, and the plan
    itself; gives [C U Hq D]. Tails lie in pages of 64 rows."""
    contexts, questions = batch.q.shape[:2]
    device, rows = batch.q.device, contexts * questions
    sizes = [sum(lengths) for lengths in batch.lengths]
    offsets = [starts_of(lengths, device) for lengths in batch.lengths]
    tables = []
    for k, v in batch.contexts:
        parts = zip(k.split(sizes), v.split(sizes), offsets, strict=True)
        layers = [ops.Context(*part) for part in parts]
        table = ops.context_table([layers[0]], contexts)
        for place, layer in enumerate(layers):
            ops.put_context_(table, place, [layer])
        tables.append(table)
    tail = batch.tails[0].shape[3]
    each = -(-tail // 64)
    whole = (F.pad(x, (0, 0, 0, 64 * each - tail)) for x in batch.tails)
    k, v = (rearrange(x, "c u h (x r) d -> (c u x) h r d", r=64).contiguous() for x in whole)
    pages = ops.Pages(k, v, torch.arange(rows * each, dtype=torch.int32, device=device).view(rows, each))
    number = torch.arange(rows, dtype=torch.int32, device=device)
    flat, listed = batch.q.flatten(0, 1), ops.QueryRows(number // questions, number, torch.full_like(number, tail))

    def make_plan() -> object:
        return ops.decode_plan(tables[0], listed, query_heads=flat.shape[1], dtype=flat.dtype, pages=pages)

    plan = make_plan()

    def run(table: ops.ContextTable) -> torch.Tensor:
        return ops.decode_rows(flat, table, 0, listed, scale=batch.scale, pages=pages, plan=plan)[0]

    return {
        "kvzip": [lambda table=table: run(table) for table in tables],
        "kvzip, the plan of a step alone": [make_plan],
    }


def bench_score(options: argparse.Namespace):
    tokens, chunk, sink, scale = 2035, 2000, 4, WIDTH**-0.5
    make = lambda heads, length: torch.randn(heads, length, WIDTH, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, k_sink, k_self = make(QUERY_HEADS, tokens), make(HEADS, chunk), make(HEADS, sink), make(HEADS, tokens)
    lse = peers.score_lse(q, k, k_sink, k_self, scale)
    hidden = torch.full((tokens, tokens), torch.finfo(q.dtype).min, dtype=q.dtype, device="cuda").triu(1)
    seen = chunk + sink + tokens / 2
    yield (
        "one chunk of 2,000, 32/8 heads",
        {
            "kvzip": [lambda: ops.score(q, k, k_sink, k_self, scale=scale)],
            "as the authors: matmul, softmax, amax": [lambda: peers.score_plainly(q, k, k_sink, k_self, hidden, scale)],
        },
        {"products": 2 * QUERY_HEADS * tokens * (seen + chunk) * WIDTH},
    )
    yield (
        "one chunk of 2,000, 32/8 heads, log-sum-exp given",
        {"kvzip": [lambda: ops.score(q, k, k_sink, k_self, scale=scale, lse=lse)]},
        {"products": 2 * QUERY_HEADS * tokens * chunk * WIDTH},
    )


BENCHMARKS = {
    "decode": bench_decode,
    "likeliest": bench_likeliest,
    "linear": linear.bench_linear,
    "prune": bench_prune,
    "quantize": bench_quantize,
    "quantize_turned": bench_quantize_turned,
    "score": bench_score,
    "select": bench_select,
}


IN_README = (
    ("decode", "0.3 of 131,072, skewed"),
    ("decode", "0.3 of 131,072, skewed, 32 questions"),
    ("decode", "8 contexts of 0.3 of 32,768, 16 questions each"),
    ("decode", "0.3 of 131,072, skewed, 512 new tokens"),
    ("score", "one chunk of 2,000, 32/8 heads"),
    ("select", "32 x 8 x 131,072 fp32"),
    ("prune", "[8, 131072, 128] bf16, 0.3 kept"),
)
"""Op and case of the rows that the README shows: one for each thing that a user waits for."""


def render_table(
    results: Path, page: Path, *, block: str = "ops", cases: Sequence[tuple[str, str]] | None = None
) -> None:
    """Puts the latest figures between the markers of a page: kvzip's and the best of the others timed in the same run.

    A run is not replaced by a later one that timed fewer others.

    Args: `cases` are the op and case of the rows wanted, in their order; None takes all, in that of the results, but
    those of the linear layer, which docs/tuning.md has, and the parts of an op.
    """
    runs: dict[tuple[str, str], dict[tuple, dict[str, dict]]] = {}
    for line in harness.read_lines(results):
        if line["op"] not in ("floor", "linear") and not line["case"].endswith(", parts"):
            of_case = runs.setdefault((line["op"], line["case"]), {})
            of_case.setdefault((line["commit"], line["date"]), {})[line["variant"]] = line
    latest = {case: max(of_case.values(), key=_told) for case, of_case in runs.items()}
    link = os.path.relpath(results, page.parent)
    rows = ["| op | case | kvzip | of the floor | best alternative timed |", "| --- | --- | ---: | ---: | --- |"]
    for op, case in latest if cases is None else [case for case in cases if case in latest]:
        variants = latest[op, case]
        own = variants.pop("kvzip", None)
        cells = ["-", "-", "-"]
        if own is not None:
            cells[:2] = [f"[{_time(own)}]({link}#L{own['line']})", f"{own['fraction_of_floor']:.0%}"]
        others = {name: line for name, line in variants.items() if not name.startswith("kvzip")}
        plain = {name: line for name, line in variants.items() if name == "kvzip, bf16"}
        if others or plain:  # another way of our own is no alternative, and stands there only where no other was timed
            name, line = min((others or plain).items(), key=lambda item: item[1]["median_us"])
            cells[2] = f"{'' if others else 'none; '}{name}, [{_time(line)}]({link}#L{line['line']})"
        rows.append(f"| {op} | {case} | {' | '.join(cells)} |")
    harness.write_between(page, block, "\n".join(rows))


def _told(run: dict[str, dict]) -> tuple[bool, int, int]:
    """What makes one run of a case the one to show: kvzip's line, more of the others beside it, and a later place."""
    others = sum(not name.startswith("kvzip") for name in run)
    return "kvzip" in run, others, max(line["line"] for line in run.values())


def _time(line: dict) -> str:
    us = line["median_us"]
    return f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"


if __name__ == "__main__":
    main()
