"""What bits and ratio cost in answers: the gold answers' likelihood, and answers that contain them, on real weights.

    python benchmarks/quality_bits.py --model DIR --data squad_article.jsonl --questions 50 --out RESULTS.jsonl
    python benchmarks/quality_bits.py --table --out RESULTS.jsonl [--page docs/concepts.md]

Data, questions and likelihoods are those of scope_quality.py: contexts are joined up to --tokens, prefilled and scored
once, and the same questions are asked of every setting's cache. One JSON line is appended for each (model, context,
setting); those that are there are not made again, so a run may be interrupted. `loglik` is the log-likelihood of each
gold answer, summed over its tokens; `contained` whether the generated answer has the gold text in it.

Settings: bits 16, 8, 4 at ratios 1, 0.5, 0.3; whole heads at 0.6 (`head`; `window` where dropped heads keep 16 first
and 64 last tokens), by --heads or the library's own scores; and at 4 bits, simulated by quantizing and restoring, other
ways to quantize keys, values as ever:
    row        rows alone, with no center and spread of their head's channels taken out
    channel    a scale and zero for each channel of as many consecutive rows of a head as a group of a row has values,
               so that there are as many of them as for rows
    exact      keys as they are, so that only the values are in 4 bits
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scope_quality import answered, cases, commit, gather, interval, read
from torch import Tensor

import kvzip
from kvzip import head_scores
from kvzip.cache import DenseCache, RaggedCache, RaggedKV
from kvzip.models import Model

SINK, RECENT = 16, 64

Lines = dict[str, dict[str, Any]]  # of one setting, by context


@dataclass(frozen=True)
class Setting:
    """One way to compress: which pairs are kept, in how many bits, and how keys are quantized."""

    ratio: float
    bits: int
    level: str = "pair"
    keys: str = ""  # another way than the library's, simulated

    @property
    def name(self) -> str:
        return f"{self.level} {self.ratio:g}, {self.bits} bits" + (f", keys by {self.keys}" if self.keys else "")


FULL = Setting(1.0, 16)
SETTINGS = (
    *(Setting(ratio, bits) for bits in (16, 8, 4) for ratio in (1.0, 0.5, 0.3)),
    Setting(0.6, 16),
    *(Setting(0.6, bits, level) for level in ("head", "window") for bits in (16, 4)),
    *(Setting(ratio, 4, keys=k) for k in ("row", "channel", "exact") for ratio in (1.0, 0.5, 0.3)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local Hugging Face directory")
    parser.add_argument("--data", nargs="+", type=Path, help="JSON lines with context, question, answers")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines that are appended to")
    parser.add_argument("--tokens", type=int, default=1_500, help="context tokens, about")
    parser.add_argument("--contexts", type=int, default=4, help="at most so many contexts of each file")
    parser.add_argument("--questions", type=int, default=25, help="questions of each context")
    parser.add_argument("--heads", type=Path, help="file of head scores (default: the library's own, if any)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"))
    parser.add_argument("--plain", action="store_true", help="ask in plain text, without the model's chat template")
    parser.add_argument("--commit", default=None, help="what is measured, where git cannot say it")
    parser.add_argument("--table", action="store_true", help="print tables of the results, and stop")
    parser.add_argument("--page", type=Path, help="also put the short tables between the markers of this page")
    arguments = parser.parse_args()
    if arguments.table:
        print_tables(read(arguments.out))
        if arguments.page:
            render(read(arguments.out), arguments.page)
    elif arguments.model and arguments.data:
        measure(arguments)
    else:
        parser.error("expected --model and --data, or --table")


def measure(arguments: argparse.Namespace) -> None:
    """Appends the lines that the results lack."""
    cuda = torch.cuda.is_available() if arguments.device is None else arguments.device.startswith("cuda")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    model = kvzip.load(arguments.model, dtype=dtype, device=arguments.device)
    heads = heads_of(model, arguments.heads)
    console = Console(stderr=True)
    if heads is None:
        console.print(f"{model.source}: no head scores come with the library; settings of heads are left out")
    settings = [setting for setting in SETTINGS if setting.level == "pair" or heads is not None]
    facts = {
        "model": Path(arguments.model).name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "plain": arguments.plain or model.template is None,
        "torch": torch.__version__,
        "kvzip": kvzip.__version__,
        "commit": arguments.commit or commit(),
    }
    done = {key_of(line) for line in read(arguments.out)}
    for path in arguments.data:
        for case in itertools.islice(cases(model, path, arguments), arguments.contexts):
            asked = {**facts, "case": f"{case.name}@{arguments.tokens}", "questions": len(case.pairs)}
            todo = [setting for setting in settings if key_of({**asked, "setting": setting.name}) not in done]
            if not todo:
                continue
            begin = time.perf_counter()
            cache = kvzip.score(model, kvzip.prefill(model, case.context, template=not facts["plain"]))
            for setting in todo:
                small = compressed(cache, heads, setting)
                line = {**asked, "tokens": cache.length, "setting": setting.name, **asdict(setting)}
                line |= {"kept": small.kept / small.total, "nbytes": None if setting.keys else kvzip.nbytes(small)}
                line |= {"dense_nbytes": kvzip.nbytes(cache), **answered(model, small, case, len(case.pairs))}
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            console.print(f"{facts['model']} {case.name}: {cache.length} tokens, {time.perf_counter() - begin:.0f} s")


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two lines the same measurement."""
    return tuple(line[name] for name in ("model", "dtype", "plain", "case", "questions", "setting"))


def heads_of(model: Model, path: Path | None) -> head_scores.HeadScores | None:
    """The head scores of a file, else those that come with the library for this model, else None."""
    if path is not None:
        return head_scores.load(path, model=model)
    try:
        return head_scores.shipped(model)
    except ValueError:
        return None


def compressed(cache: DenseCache, heads: head_scores.HeadScores | None, setting: Setting) -> RaggedCache:
    """The cache of a setting."""
    bits = None if setting.bits == 16 or setting.keys else setting.bits
    if setting.level == "pair":
        small = kvzip.compress(cache, setting.ratio, bits=bits)
    else:
        assert heads is not None
        sink, recent = (SINK, RECENT) if setting.level == "window" else (0, 0)
        by_heads = head_scores.attach(cache, heads)
        small = kvzip.compress(by_heads, setting.ratio, level="head", sink=sink, recent=recent, bits=bits)
    if not setting.keys:
        return small
    context = [simulated(kv, setting) if isinstance(kv, RaggedKV) else kv for kv in small.context]
    return replace(small, context=tuple(context))


def simulated(kv: RaggedKV, setting: Setting) -> RaggedKV:
    """A layer whose keys were quantized in another way and restored, its values as the library does it."""
    assert isinstance(kv.k, Tensor) and isinstance(kv.v, Tensor)
    bounds = kv.offsets.tolist()
    heads = [kv.k[a:b].float() for a, b in itertools.pairwise(bounds)]
    keys = torch.cat([WAYS[setting.keys](head, setting.bits) if len(head) else head for head in heads])
    values = kvzip.ops.dequantize(kvzip.ops.quantize(kv.v, bits=setting.bits), dtype=kv.v.dtype)
    return replace(kv, k=keys.to(kv.k.dtype), v=values)


def by_row(x: Tensor, bits: int) -> Tensor:
    return kvzip.ops.dequantize(kvzip.ops.quantize(x, bits=bits))


def by_channel(x: Tensor, bits: int) -> Tensor:
    restored = []
    for rows in x.split(min(128, x.shape[1])):
        low, high = rows.aminmax(dim=0)
        step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        restored.append(low + ((rows - low) / step).round() * step)
    return torch.cat(restored)


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "row": by_row,
    "channel": by_channel,
    "exact": lambda x, bits: x,
}


def print_tables(lines: list[dict[str, Any]]) -> None:
    """Prints one table for each model, dtype and form of question, of the contexts that all its settings have."""
    if not lines:
        raise SystemExit("expected results, got none: measure first")
    console = Console()
    for model, by, shared in grouped(lines):
        if FULL.name in by and shared:
            console.print(table_of(by, shared))
        else:
            console.print(f"{model}: no context has all settings yet")


def grouped(lines: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Lines], list[str]]]:
    """Yields each model (dtype and form of question) with its lines by setting, and the contexts that all have."""
    groups: dict[tuple[str, str, bool], dict[str, Lines]] = {}
    for line in lines:
        group = groups.setdefault((line["model"], line["dtype"], line["plain"]), {})
        group.setdefault(line["setting"], {})[line["case"]] = line
    for (model, *_), by in groups.items():
        yield model, by, sorted(set.intersection(*map(set, by.values())))


def table_of(by: dict[str, Lines], shared: list[str]) -> Table:
    """The table of one model. Brackets are 95% intervals of a bootstrap over questions.

    `loglik` is the mean of a gold answer, in nats; `gained` that above the full cache's; `moved` the mean size of its
    change, up or down, from 16 bits of the same pairs, in which noise does not cancel; `more than ours` how much more
    it moved than with keys quantized as the library does it. All compare the same questions.
    """
    facts = by[FULL.name][shared[0]]
    form = "plain text" if facts["plain"] else "chat template"
    loglik = {name: gather(lines, shared, "loglik") for name, lines in by.items()}
    count = len(loglik[FULL.name])
    table = Table(
        title=f"{facts['model']}, {facts['dtype']} on {facts['device']}: "
        f"{count} questions of {len(shared)} contexts, {form}"
    )
    for column in ("setting", "kept", "bytes", "contains gold, %", "loglik", "gained", "moved", "more than ours"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name, setting in ((setting.name, setting) for setting in SETTINGS if setting.name in by):
        lines = [by[name][case] for case in shared]
        wide, ours = (replace(setting, keys="", **change).name for change in ({"bits": 16}, {}))
        moved = np.abs(loglik[name] - loglik[wide])
        table.add_row(
            name,
            f"{np.mean([line['kept'] for line in lines]):.3f}",
            "-" if name != ours else f"{np.mean([line['nbytes'] / line['dense_nbytes'] for line in lines]):.3f}",
            bracketed(100 * gather(by[name], shared, "contained"), "{:.0f}"),
            f"{loglik[name].mean():.2f}",
            bracketed(loglik[name] - loglik[FULL.name], "{:+.2f}"),
            "" if name == wide else bracketed(moved, "{:.2f}"),
            "" if name == ours else bracketed(moved - np.abs(loglik[ours] - loglik[wide]), "{:+.2f}"),
        )
    return table


def render(lines: list[dict[str, Any]], page: Path) -> None:
    """Puts two short tables of all models between the markers of a page: bits by ratio, and whole heads."""
    bits = ["| model, questions | ratio | bytes | contains the gold text, % | log-likelihood gained |"]
    heads = ["| model | pairs at 0.6 | heads at 0.6 | and 16 first, 64 latest tokens of dropped heads |"]
    bits.append("| --- | ---: | ---: | ---: | ---: |")
    heads.append("| --- | ---: | ---: | ---: |")
    for model, by, shared in grouped(lines):
        count = len(gather(by[FULL.name], shared, "loglik"))
        for ratio in (1.0, 0.5, 0.3):
            cells = zip(*(in_short(by, shared, Setting(ratio, width)) for width in (16, 8, 4)), strict=True)
            bits.append(f"| {model}, {count} | {ratio:g} | " + " | ".join(" / ".join(cell) for cell in cells) + " |")
        chosen = (Setting(0.6, 16), Setting(0.6, 16, "head"), Setting(0.6, 16, "window"))
        cells = ["{} of bytes, {}%, {}".format(*in_short(by, shared, setting)) for setting in chosen]
        heads.append(f"| {model} | " + " | ".join(cells) + " |")
    text = page.read_text(encoding="utf-8")
    for name, table in (("bits", bits), ("heads", heads)):
        begin, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        text = text.split(begin)[0] + "\n".join([begin, *table, end]) + text.split(end)[1]
    page.write_text(text, encoding="utf-8")


def in_short(by: dict[str, Lines], shared: list[str], setting: Setting) -> tuple[str, str, str]:
    """Bytes of the full cache's, percent of answers that contain the gold text, and log-likelihood gained."""
    found = by[setting.name]
    size = np.mean([found[case]["nbytes"] / found[case]["dense_nbytes"] for case in shared])
    contained = gather(found, shared, "contained").mean()
    gained = gather(found, shared, "loglik") - gather(by[FULL.name], shared, "loglik")
    return f"{size:.3f}", f"{100 * contained:.0f}", f"{gained.mean():+.2f}"


def bracketed(values: np.ndarray, form: str) -> str:
    mean, low, high = (form.format(x) for x in interval(values, np.random.default_rng(0)))
    return f"{mean} \\[{low}, {high}]"


if __name__ == "__main__":
    main()
