"""Times launches of decode and score on one GPU, cold, in CUDA graphs; used to choose their launch tables.

    python benchmarks/ops_decode_score.py OUT.jsonl [part ...]

Every configuration is first compiled and checked against the reference in a pool of processes, then timed in one.
"""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import statistics
import sys

import torch

from kvzip.ops.decode import decode_reference, decode_schedule
from kvzip.ops.quantize import quantize
from kvzip.ops.score import score_reference
from kvzip.ops.triton import decode, score

LENGTHS = {
    "131072": (40315, 54085, 19669, 21874, 30754, 47293, 40003, 60577),
    "32768": (10078, 13521, 4917, 5468, 7688, 11823, 10000, 15144),
    "even": (39321,) * 8,
    "half": (157284,) + (22469,) * 7,
}
COLD_BYTES = 400e6
BF16 = torch.bfloat16


@functools.cache
def decode_inputs(lengths, B, T, D, bits, tail, caches, group=4):
    """Inputs of `decode` over as many different caches as asked."""
    torch.manual_seed(0)
    H, N = len(LENGTHS[lengths]), sum(LENGTHS[lengths])
    offsets = torch.tensor([0, *torch.tensor(LENGTHS[lengths]).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    q = torch.randn(B, H * group, T, D, dtype=BF16, device="cuda")
    pairs = []
    for _ in range(caches):
        k, v = (torch.randn(N, D, dtype=BF16, device="cuda") for _ in "kv")
        pairs.append((k, v) if bits == 16 else (quantize(k, bits=bits), quantize(v, bits=bits)))
    ends = None
    if tail:
        k, v = (torch.randn(B, H, tail, D, dtype=BF16, device="cuda") for _ in "kv")
        ends = (k, v, torch.full((B,), tail * 2 // 3, dtype=torch.int32, device="cuda"))
    return q, pairs, offsets, ends


@functools.cache
def schedule_of(lengths, per_processor):
    offsets = torch.tensor([0, *torch.tensor(LENGTHS[lengths]).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    return decode_schedule(offsets, processors=round(132 * per_processor / 2))


def decode_call(case, index, caches):
    q, pairs, offsets, ends = decode_inputs(
        case["lengths"], case["B"], case["T"], case["D"], case["bits"], case["tail"], caches
    )
    k, v = pairs[index]
    schedule = schedule_of(case["lengths"], case["per_processor"])
    rows = q[:, 0, :, 0].numel() * 4
    config = case["config"] or decode.launch_config(q.shape[3], rows, q.dtype, case["bits"])
    config = decode.Launch(*config)
    pieces = decode.choose_level(schedule, config, rows) if case["level"] is None else schedule.levels[case["level"]]
    return decode.launch(q, k, v, offsets, q.shape[3] ** -0.5, None, None, pieces, ends, config, case["overlap"])


@functools.cache
def score_inputs(T=2030, C=2000, A=30, H=8, G=4, D=128):
    torch.manual_seed(0)
    q = torch.randn(H * G, T, D, dtype=BF16, device="cuda")
    keys = [torch.randn(H, n, D, dtype=BF16, device="cuda") for n in (C, A, T)]
    return q, *keys, torch.randn(H * G, T, device="cuda") + 9


def score_call(case):
    q, k, k_sink, k_self, lse = score_inputs()
    lse = lse if case["lse"] else None
    walks = [score.Launch(*case[name]) if case[name] else default for name, default in
             zip(("normalizer", "largest"), score.launch_config(q.shape[2], q.dtype), strict=True)]  # fmt: skip
    return score.launch(*walks, q, k, k_sink, k_self, q.shape[-1] ** -0.5, None, lse, None, None, splits=case["splits"])


def check(case):
    """Compiles a case and compares it with the reference; returns the relative error."""
    try:
        if case["op"] == "score":
            got = score_call(case)
            q, k, k_sink, k_self, lse = score_inputs()
            want = score_reference(q, k, k_sink, k_self, scale=q.shape[-1] ** -0.5, lse=lse if case["lse"] else None)
        else:
            got, _ = decode_call(case, 0, 1)
            q, pairs, offsets, ends = decode_inputs(
                case["lengths"], case["B"], case["T"], case["D"], case["bits"], case["tail"], 1
            )
            few = q if case["T"] == 1 else q[:, :, :8]
            if case["B"] > 4 or case["T"] > 1:
                few, got = few[:1], got[:1, :, : few.shape[2]]
                ends = None if ends is None else tuple(x[:1] for x in ends)
            want, _ = decode_reference(few, *pairs[0], offsets, scale=q.shape[-1] ** -0.5, tail=ends)
        error = ((got.float() - want.float()).norm() / want.float().norm()).item()
        return error
    except Exception as failure:
        return repr(failure)[:300]


def time_graph(calls, repeats=15):
    """Median and spread in microseconds of one of `calls`, replayed together as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(repeats + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    times = sorted(times[3:])
    return statistics.median(times), times[-2] - times[1]


def measure(case):
    if case["op"] == "score":
        us, spread = time_graph([functools.partial(score_call, case)] * 10)
        return us, spread, {}
    size = sum(LENGTHS[case["lengths"]]) * case["D"] * 2 * case["bits"] / 8
    if case["bits"] < 16:
        size += sum(LENGTHS[case["lengths"]]) * 8 * math.ceil(case["D"] / 128)
    caches = 1 if case["T"] > 64 else max(2, math.ceil(COLD_BYTES / size))
    repeat = 1 if case["T"] > 64 else 2
    us, spread = time_graph([functools.partial(decode_call, case, i, caches) for i in range(caches)] * repeat)
    flops = 4 * case["B"] * case["T"] * 4 * sum(LENGTHS[case["lengths"]]) * case["D"]
    return us, spread, {"TB_s": round(size / us / 1e6, 3), "TFLOP_s": round(flops / us / 1e6, 1)}


def make_decode(
    config=None, lengths="131072", B=1, T=1, D=128, bits=16, tail=0, per_processor=2, level=None, overlap=True
):
    return dict(op="decode", config=config, lengths=lengths, B=B, T=T, D=D, bits=bits, tail=tail,
                per_processor=per_processor, level=level, overlap=overlap)  # fmt: skip


def make_score(normalizer=None, largest=None, lse=False, splits=None):
    return dict(op="score", normalizer=normalizer, largest=largest, lse=lse, splits=splits)


def cases(parts):
    found = []
    for part in parts:
        found += eval(part, {"d": make_decode, "s": make_score, "LENGTHS": LENGTHS})
    return found


def main():
    path, *parts = sys.argv[1:]
    todo = cases(parts)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(14, mp_context=context) as pool:
        errors = list(pool.map(check, todo))
    names = torch.cuda.get_device_name(), torch.__version__
    with open(path, "a") as file:
        for case, error in zip(todo, errors, strict=True):
            row = dict(case, error=error, gpu=names[0], torch=names[1])
            if isinstance(error, float):
                us, spread, extra = measure(case)
                row |= dict(us=round(us, 2), spread=round(spread, 2), **extra)
            file.write(json.dumps(row) + "\n")
            file.flush()
            short = {k: v for k, v in row.items() if k not in ("op", "gpu", "torch") and v is not None}
            print(
                " ".join(
                    f"{k}={v:.1e}" if k == "error" and isinstance(v, float) else f"{k}={v}" for k, v in short.items()
                )
            )
            if case["op"] == "decode":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
