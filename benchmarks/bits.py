"""What quantizers cost at equal bytes, before any has a kernel: they are simulated on the rows of real caches.

    python benchmarks/bits.py study MODEL_DIR [MODEL_DIR ...] --data DATA [--workers 6] [--limit 230]
    python benchmarks/bits.py show [--by-task]

`study`: likelihood of reference answers, as `refitting.py study`, of contexts that are compressed to a ratio of pairs
(--ratios) or to a share of the full cache's bytes (--shares): as many rows as then fit, metadata and biases counted. A
variant is a form of FORMS, bits of keys and values, and what is added: "rotated:4/2", "kvarn:4/2+refit". "+refit" fits
biases and values for quantized keys; "+gram" rounds the fitted values of a chunk one row after the other, so that later
rows make up for what earlier ones lost by the fit's Gram matrix (GPTQ, arXiv 2210.17323); "+clip" searches each range;
"+shaped" does so with the channels of keys by what queries ask, and "+model" takes the moments of queries and keys of
another context; with "+outputs" values are treated as keys, by what the output projection makes of them; "+g32" has a
step for 32 values; "+prefix", "+first1" and "+first4" keep rows of the prefix in 16 bits. The forms "roots" to
"axroots" are those that the design was chosen among at last. Rows of 16 bits are "plain:16/16".
`show`: bytes of a kept pair and of the cache as a part of the full one, nats of the answers lost to it, and how far
predictions are from its own (in nats a token, which tells variants apart with few questions; lowest first).
Each figure is one JSON line appended to benchmarks/results/bits.jsonl; the study goes on where it stopped (exit code 75
after a time limit). Workers are spread over the GPUs of CUDA_VISIBLE_DEVICES.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from jaxtyping import Float
from torch import Tensor

import kvzip
from benchmarks import harness, studying
from benchmarks.other_data import TASKS
from benchmarks.quantizers import Way, hadamard, moments, restored, rounded, stored_bytes
from kvzip import DenseCache, Model, RaggedCache
from kvzip.cache import RaggedKV, WindowKV, nbytes
from kvzip.cache.rows import first_rows
from kvzip.evals.asking import gold_logits, prefill_example
from kvzip.evals.tasks import Example
from kvzip.options import Refitting
from kvzip.refitting import fit_rows
from kvzip.refitting.fitting import Rows
from kvzip.refitting.solving import Fit
from kvzip.refitting.systems import Systems

RESULTS = harness.RESULTS / "bits.jsonl"
RATIOS = (1.0, 0.3)
SHARES = (0.1, 0.05)
FORMS = {  # of keys, of values
    "plain": (Way(), Way()),
    "rows": (Way(), Way()),
    "today": (Way(center=True, spread=True), Way()),
    "blocks": (Way(channels=True), Way()),
    "rotated": (Way(center=True, rotate=True), Way(rotate=True)),
    "spread": (Way(center=True, spread=True, rotate=True), Way(rotate=True)),
    "roots": (Way(center=True, root=True, first=True, rotate=True), Way(rotate=True)),
    "plainv": (Way(center=True, root=True, first=True, rotate=True), Way()),
    "narrow8": (Way(center=True, root=True, first=True, rotate=True), Way(rotate=True, narrow=0.8)),
    "narrow7": (Way(center=True, root=True, first=True, rotate=True), Way(rotate=True, narrow=0.7)),
    "axroots": (Way(center=True, root=True, first=True, rotate=True, asked="axes"), Way(rotate=True)),
    "centered": (Way(center=True, rotate=True), Way(center=True, rotate=True)),
    "scaled": (Way(center=True, rotate=True, asked="scale"), Way(rotate=True)),
    "matched": (Way(center=True, rotate=True, asked="matrix"), Way(rotate=True)),
    "white": (Way(center=True, rotate=True, asked="white"), Way(rotate=True)),
    "axes": (Way(center=True, rotate=True, asked="axes"), Way(rotate=True)),
    "tiles": (Way(center=True, rotate=True, channels=True), Way(rotate=True)),
    "kvarn": (Way(center=True, rotate=True, balance=True, channels=True), Way(rotate=True, balance=True)),
}
BEST = "+first1+model+shaped+outputs"
VARIANTS = (
    *("plain:16/16", "today:8/8", "today:8/4", "today:4/4", "today:4/2", "rows:4/4", "blocks:4/4", "tiles:4/4"),
    *(f"{form}:{bits}" for form in ("rotated", "kvarn") for bits in ("4/4", "5/3", "6/2", "4/2", "3/3")),
    *("rotated:4/4+first1", "kvarn:4/4+first1", "matched:4/4+first1", "matched:4/4+first1+model"),
    *("white:4/4+first1+model+shaped", "white:4/4+first1+shaped+outputs", f"axes:4/4{BEST}", f"matched:4/4{BEST}"),
    *(f"white:{bits}{BEST}" for bits in ("5/4", "4/4", "4/3", "3/3", "4/2", "3/2", "2/2")),
    *("plain:16/16+refit", "today:4/4+refit", "rotated:4/4+refit", "rotated:4/4+gram"),
    *("roots:4/4", "plainv:4/4", "axroots:4/4+shaped", "roots:4/2", "narrow8:4/2"),
    *(f"white:{bits}{BEST}+refit" for bits in ("4/4", "4/3", "3/3", "3/2")),
)
BIAS = 2  # bytes of a row's
FIRST = {"prefix": 1 << 30, "first1": 1, "first4": 4}


@dataclass(frozen=True)
class Variant:
    """How rows are stored: ways and bits of keys and values, whether they are fitted and rounded by the fit."""

    ways: tuple[Way, Way]
    bits: tuple[int, int]
    refit: bool = False
    gram: bool = False
    model: bool = False
    first: int = 0  # rows of each head that stay in 16 bits, at most the prefix


def variant_of(name: str) -> Variant:
    """Returns what a name says. Raises ValueError for one that is not understood."""
    base, *more = name.split("+")
    form, _, bits = base.partition(":")
    found = [int(x) for x in bits.split("/") if x.isdigit()]
    if (
        form not in FORMS
        or len(found) != 2
        or set(more) - {"refit", "gram", "clip", "g32", "shaped", "model", "outputs", *FIRST}
    ):
        raise ValueError(f"expected a variant such as kvarn:4/2+refit, got {name!r}: forms are {', '.join(FORMS)}")
    k, v = (replace(way, clip="clip" in more, group=32 * ("g32" in more)) for way in FORMS[form])
    k, gram = replace(k, shaped="shaped" in more), "gram" in more
    v = replace(v, asked=k.asked, shaped=k.shaped) if "outputs" in more else v
    return Variant(
        (k, v),
        (found[0], found[1]),
        gram or "refit" in more,
        gram,
        "model" in more,
        max(FIRST.get(x, 0) for x in more or [""]),
    )


def made(
    model: Model,
    context: Example,
    held: dict[str, Any],
    wanted: Mapping[str, Any],
    options: argparse.Namespace,
) -> tuple[DenseCache | RaggedCache, dict[str, Any]]:
    """Returns the cache of a variant with the values that its rows are restored to, and the bytes it would have."""
    scored = studying.scored(model, context, held, "kvzip", options)
    if wanted["variant"] == "full":
        return scored, {"bytes": nbytes(scored), "kept": 1.0}
    how = variant_of(wanted["variant"])
    if "share" in wanted:
        small = within(scored, int(wanted["share"] * nbytes(scored)), how)
    else:
        small = kvzip.compress(scored, wanted["ratio"])
    told = {"bytes": bytes_of(small, how), "kept": round(small.kept / small.total, 6)}
    told["pair"] = round((told["bytes"] - bytes_of(small, how, pairs=False)) / rows_of(small), 2)
    asked = asked_of(model, scored, how, held, options)
    layers = [
        replace(x, k=back(x, 0, how, small.start, asked.get((0, n)))) if isinstance(x, RaggedKV) else x
        for n, x in enumerate(small.context)
    ]
    if how.refit:
        fit = partial(by_gram, how=how) if how.gram else None
        with torch.no_grad():
            fitted, _ = fit_rows(model, scored, layers, Refitting(chunk=options.chunk), rounded=fit)
        pairs = zip(layers, fitted, strict=True)
        layers = [x if isinstance(x, WindowKV) or own is None else with_rows(x, own) for x, own in pairs]
    layers = [
        replace(x, v=back(x, 1, how, small.start, asked.get((1, n)))) if isinstance(x, RaggedKV) else x
        for n, x in enumerate(layers)
    ]
    return replace(small, context=tuple(layers)), told


def asked_of(
    model: Model, cache: DenseCache, how: Variant, held: dict[str, Any], options: argparse.Namespace
) -> dict[tuple[int, int], tuple[Tensor, ...]]:
    """Returns what `restored` takes for keys (0) and values (1) of each layer: moments of this context, or another."""
    if not how.ways[0].asked:
        return {}
    if "outputs" not in held:
        width, heads = model.config.head_dim, model.config.num_kv_heads
        own = {n: model.weights.layers[n].o.float().unflatten(1, (heads, -1, width)) for n in cache.scored_layers}
        held["outputs"] = {n: torch.einsum("mhgc,mhgd->hcd", o, o) for n, o in own.items()}
    outputs = held["outputs"]
    if not how.model:
        if "moments" not in held:
            held["moments"] = {(0, n): (x,) for n, x in moments(model, cache, options.chunk).items()}
            held["moments"] |= {(1, n): (x,) for n, x in outputs.items()}
        return held["moments"]
    if "others" not in held:
        request = replace(studying.request_of(model, options), seed=options.seed + 1, length=options.calibration)
        other = prefill_example(model, next(iter(TASKS["quote"].make(request))), form=options.form)
        held["others"] = {}
        for n, queries in moments(model, other, options.chunk).items():
            keys = other.layers[n].k[0, :, 1:].float()  # not the first, to which most attention goes
            rest = keys - keys.mean(1, keepdim=True)
            held["others"][0, n] = queries, rest.mT @ rest / rest.shape[1]
            values = other.layers[n].v[0, :, 1:].float()
            held["others"][1, n] = outputs[n], values.mT @ values / values.shape[1]
    return held["others"]


def with_rows(layer: RaggedKV, rows: Rows) -> RaggedKV:
    return replace(layer, v=rows.values, bias=rows.bias)


def back(
    layer: RaggedKV, part: int, how: Variant, start: int, asked: Sequence[Tensor] | None = None
) -> Float[Tensor, "N D"]:
    """Returns a layer's keys (part 0) or values (1) as they are restored."""
    x = (layer.k, layer.v)[part]
    assert isinstance(x, Tensor)
    found = restored(x, layer.offsets, how.bits[part], how.ways[part], asked)
    if how.first:
        rows = first_rows(layer, min(how.first, start)).flatten()
        found = found.index_copy(0, rows, x[rows])
    return found


def by_gram(systems: Systems, fit: Fit, how: Variant) -> Fit:
    """Returns the fit with values that are restored from bits. Each row in turn, those of the largest weight first, is
    rounded, and the rows after it change so that the objective of `fit_values`, with its pull, is least."""
    way, bits, w = how.ways[1], how.bits[1], fit.bias.exp()
    weighted = systems.gram * w[:, :, None] * w[:, None]
    trace = weighted.diagonal(dim1=1, dim2=2).sum(1)
    pull = Refitting.pull * torch.linalg.vector_norm(weighted, dim=(1, 2)).square() / trace.clamp_min(1e-30)
    least = 1e-6 * trace / systems.width  # rows that no query looks at
    weighted.diagonal(dim1=1, dim2=2).add_(torch.maximum(pull, least)[:, None].clamp_min(1e-12))
    order = weighted.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    pick = order[..., None].expand(-1, -1, systems.width)
    matrix = weighted.gather(1, pick).gather(2, pick.mT)
    upper = torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True).to(matrix.dtype)
    rows = order[..., None].expand_as(systems.old)
    target = (systems.old + fit.change + systems.mean[:, None]).gather(1, rows)
    turn = hadamard(target.shape[2], target) if way.rotate else None
    target = target if turn is None else target @ turn
    kept = torch.empty_like(target)
    for j in range(systems.width):
        kept[:, j] = rounded(target[:, j], bits, way)
        off = (target[:, j] - kept[:, j]) / upper[:, j, j, None]
        target[:, j + 1 :] -= upper[:, j, j + 1 :, None] * off[:, None]
    kept = kept if turn is None else kept @ turn
    values = torch.empty_like(kept).scatter_(1, rows, kept)
    return replace(fit, change=values - systems.old - systems.mean[:, None])


def compared(
    model: Model,
    cache: DenseCache | RaggedCache,
    example: Example,
    held: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Returns what `studying.answered` does, and how far predictions of the answers' tokens are from the full cache's.

    "kl" is the mean over tokens of the sum of p log(p / q), p by the full cache, in nats.
    """
    if "logits" not in held:
        full = gold_logits(model, held["kvzip"], example.questions, form=options.form)
        held["logits"] = [scores.log_softmax(-1) for _, scores in full]
    logliks, exact, apart = [], [], []
    found = gold_logits(model, cache, example.questions, form=options.form)
    for (target, scores), full in zip(found, held["logits"], strict=True):
        own = scores.log_softmax(-1)
        logliks.append(own.gather(1, target[:, None]).double().sum().item())
        exact.append(float((scores.argmax(-1) == target).all()))
        apart.append((full.exp() * (full - own)).sum(-1).mean().item())
    return {name: statistics.fmean(values) for name, values in (("loglik", logliks), ("exact", exact), ("kl", apart))}


def within(cache: DenseCache, limit: int, how: Variant) -> RaggedCache:
    """Returns as many pairs as fit into `limit` bytes."""
    low, high = 0, cache.total
    while low < high:
        middle = (low + high + 1) // 2
        fits = bytes_of(kvzip.compress(cache, budget=middle / per_head(cache)), how) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    if not low:
        raise studying.Impossible(
            f"expected room for a pair in {limit} bytes, got none: take a longer context or a larger share"
        )
    return kvzip.compress(cache, budget=low / per_head(cache))


def per_head(cache: DenseCache) -> int:
    return len(cache.scored_layers) * cache.heads


def rows_of(cache: RaggedCache) -> int:
    return sum(len(x.positions) for x in cache.context if isinstance(x, RaggedKV))


def bytes_of(cache: RaggedCache, how: Variant, *, pairs: bool = True) -> int:
    """Returns the bytes that the cache would have; without `pairs` of all but keys, values, positions and biases."""
    size = nbytes(cache)
    for layer in cache.context:
        if not isinstance(layer, RaggedKV):
            continue
        assert isinstance(layer.k, Tensor)
        assert isinstance(layer.v, Tensor)
        size -= layer.k.nbytes + layer.v.nbytes
        if not pairs:
            size -= layer.positions.nbytes
            continue
        counts, element = layer.offsets.diff().tolist(), layer.k.element_size()
        own = [count - min(how.first, cache.start) for count in counts]
        for way, bits in zip(how.ways, how.bits, strict=True):
            size += stored_bytes(own, layer.width, bits, way, element)
            size += (sum(counts) - sum(own)) * layer.width * element
        size += BIAS * len(layer.positions) * how.refit
    return size


def study_part(options: argparse.Namespace) -> int:
    for name in options.variants:
        variant_of(name)
    wanted: list[dict[str, Any]] = [{"variant": "full", "ratio": 1.0}]
    wanted += [{"variant": v, "ratio": r} for r in options.ratios for v in options.variants]
    wanted += [{"variant": v, "share": s} for s in options.shares for v in options.variants]
    return studying.study(options, wanted, made, compared)


def show_part(options: argparse.Namespace) -> int:
    """Prints means over the contexts of each task, then over tasks; a table for each model and size."""
    lines = {studying.key_of(line): line for line in studying.lines_of(options.results)}.values()
    full = {(x["model"], x["task"], x["example"]): x for x in lines if x["variant"] == "full"}
    cells: dict[tuple[str, str, str], dict[str, list[dict[str, float]]]] = {}
    for line in lines:
        whole = full.get((line["model"], line["task"], line["example"]))
        if line["variant"] == "full" or whole is None:
            continue
        size = f"{line['share']:g} of the bytes" if "share" in line else f"ratio {line['ratio']:g}"
        found = {
            "lost": whole["loglik"] - line["loglik"],
            "exact": line["exact"],
            "full": whole["exact"],
            "kl": line["kl"],
        }
        found |= {"bytes": line["bytes"] / whole["bytes"], "kept": line["kept"], "pair": line["pair"]}
        cells.setdefault((line["model"], size, line["variant"]), {}).setdefault(line["task"], []).append(found)
    before, names = None, []
    for (model, size, variant), tasks in sorted(cells.items(), key=lambda cell: (*cell[0][:2], mean(cell[1], "kl"))):
        if (model, size) != before:
            before = model, size
            print(f"\n{model}, {size}; greedy with all pairs {100 * mean(tasks, 'full'):.1f}%\n")
            names = sorted(tasks) if options.by_task else []
            columns = [
                "variant",
                "bytes a pair",
                "of the bytes",
                "kept",
                "nats lost",
                "divergence",
                "greedy",
                "contexts",
                *names,
            ]
            print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        own = [f"{mean({name: tasks[name]}, 'kl'):.3f}" if name in tasks else "" for name in names]
        part = {name: mean(tasks, name) for name in ("pair", "bytes", "kept", "lost", "kl", "exact")}
        print(
            f"| {variant} | {part['pair']:.1f} | {part['bytes']:.4f} | {part['kept']:.3f} | {part['lost']:.3f} | "
            f"{part['kl']:.4f} | {100 * part['exact']:.1f}% | {sum(map(len, tasks.values()))} |"
            + "".join(f" {x} |" for x in own)
        )
    return 0


def mean(tasks: Mapping[str, list[dict[str, float]]], name: str) -> float:
    return statistics.fmean(statistics.fmean(x[name] for x in own) for own in tasks.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parts = parser.add_subparsers(dest="part", required=True)
    study = parts.add_parser("study")
    studying.add_options(study)
    study.add_argument("--variants", nargs="+", default=VARIANTS)
    study.add_argument("--calibration", type=int, default=3_000, help="tokens of the text of the form model")
    study.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    study.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the full cache's bytes")
    show = parts.add_parser("show")
    show.add_argument("--by-task", action="store_true")
    options = parser.parse_args()
    return {"study": study_part, "show": show_part}[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
