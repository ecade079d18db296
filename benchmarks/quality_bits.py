"""What bits and ratio cost in answers: the gold answers' likelihood, and answers that contain them, on real weights.

    python benchmarks/quality_bits.py --model DIR --data squad_article.jsonl --questions 100 --out RESULTS.jsonl
    python benchmarks/quality_bits.py --table --out RESULTS.jsonl

Each line of a data file has `context`, `question` and `answers`, the last two lists of equal length. Contexts are
joined up to --tokens, prefilled and scored once (scope "context"), then compressed by every setting, and --per-context
questions are asked of each. Gold answers are teacher-forced in one batch: `loglik` is the sum over the tokens of each
answer. `contained` says of each generated answer whether the gold text is in it. One JSON line is appended for each
(model, context, setting); those that are there are not made again, so a run may be interrupted.

Settings: bits 16, 8, 4 at ratios 1, 0.5, 0.3; whole heads at 0.6 (`head`; `window` where dropped heads keep 16 first
and 64 last tokens), by --heads or the library's own scores; and at 4 bits, simulated by quantizing and restoring, other
ways to quantize keys, values as ever:
    channel    a scale and zero for each channel of as many consecutive rows of a head as a group of a row has values,
               so that there are as many of them as for rows
    centered   rows as ever, after the head's mean key was subtracted (it moves all logits of a query alike)
    scaled     rows as ever, after the mean was subtracted and each channel divided by its range in the head
    exact      keys as they are, so that only the values are in 4 bits
"""

import argparse
import itertools
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kvzip
from kvzip import head_scores, prompts
from kvzip.attention import decode_attend
from kvzip.cache import DenseCache, RaggedCache, RaggedKV, all_ragged, empty_tail
from kvzip.models import Model, forward, logits
from kvzip.prefilling import prompt_of, tokenizer_of

ASK = " Answer with a few words of the text."
PLAIN_ASK, PLAIN_ANSWER = "\n\nQuestion: ", "\nAnswer:"
SINK, RECENT = 16, 64
SAMPLES = 4_000  # of the bootstrap


@dataclass(frozen=True)
class Setting:
    """One way to compress: which pairs are kept, in how many bits, and how keys are quantized."""

    ratio: float
    bits: int
    level: str = "pair"
    keys: str = "row"

    @property
    def name(self) -> str:
        return f"{self.level} {self.ratio:g}, {self.bits} bits" + ("" if self.keys == "row" else f", keys {self.keys}")


FULL = Setting(1.0, 16)
SETTINGS = (
    *(Setting(ratio, bits) for bits in (16, 8, 4) for ratio in (1.0, 0.5, 0.3)),
    *(Setting(0.6, bits, level) for level in ("head", "window") for bits in (16, 4)),
    Setting(0.6, 16),
    *(Setting(ratio, 4, keys=k) for k in ("channel", "centered", "scaled", "exact") for ratio in (1.0, 0.5, 0.3)),
)


@dataclass(frozen=True)
class Case:
    """A context, and its questions with their gold answers."""

    name: str
    context: str
    pairs: tuple[tuple[str, str], ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local Hugging Face directory")
    parser.add_argument("--data", nargs="+", type=Path, help="JSON lines with context, question, answers")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines that are appended to")
    parser.add_argument("--questions", type=int, default=100, help="of each data file")
    parser.add_argument("--per-context", type=int, default=25, help="questions of each context")
    parser.add_argument("--tokens", type=int, default=1_500, help="context tokens, about")
    parser.add_argument("--heads", type=Path, help="file of head scores (default: the library's own, if any)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"))
    parser.add_argument("--plain", action="store_true", help="ask in plain text, without the model's chat template")
    parser.add_argument("--answer-tokens", type=int, default=16, help="of generated answers; 0 generates none")
    parser.add_argument("--commit", default=None, help="what is measured, where git cannot say it")
    parser.add_argument("--table", action="store_true", help="print tables of the results, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print_tables(read(arguments.out))
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
    for case in cases(model, arguments):
        todo = [x for x in settings if key_of({**facts, "case": case.name, "setting": x.name}) not in done]
        if not todo:
            continue
        begin = time.perf_counter()
        cache = kvzip.score(model, kvzip.prefill(model, case.context, template=not facts["plain"]))
        console.print(f"{facts['model']} {case.name}: {cache.length} tokens in {time.perf_counter() - begin:.0f} s")
        for setting in todo:
            small = compressed(cache, heads, setting)
            line = {**facts, "case": case.name, "tokens": cache.length, "setting": setting.name, **asdict(setting)}
            line |= {"kept": small.kept / small.total, "nbytes": None, "dense_nbytes": kvzip.nbytes(cache)}
            if setting.keys == "row":  # the others are simulated
                line["nbytes"] = kvzip.nbytes(small)
            line["loglik"], line["answer_tokens"] = forced(model, small, case.pairs)
            line["contained"] = answered(model, small, case.pairs, arguments.answer_tokens)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        console.print(f"{facts['model']} {case.name}: {time.perf_counter() - begin:.0f} s")


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two lines the same measurement."""
    return tuple(line[name] for name in ("model", "dtype", "plain", "case", "setting"))


def commit() -> str:
    """The commit that is measured, with a mark if files differ from it."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def heads_of(model: Model, path: Path | None) -> head_scores.HeadScores | None:
    """The head scores of a file, else those that come with the library for this model, else None."""
    if path is not None:
        return head_scores.load(path, model=model)
    try:
        return head_scores.shipped(model)
    except ValueError:
        return None


def cases(model: Model, arguments: argparse.Namespace) -> Iterator[Case]:
    """Joins the contexts of each data file, in order, up to the tokens asked for; the rest at the end is not used."""
    for path in arguments.data:
        texts: list[str] = []
        pairs: list[tuple[str, str]] = []
        used, number, left = 0, 0, arguments.questions
        for row in read(path):
            texts.append(row["context"])
            pairs += zip(row["question"], row["answers"], strict=True)
            used += len(prompts.encode_text(tokenizer_of(model), row["context"]))
            if used < arguments.tokens:
                continue
            name, count = f"{path.stem}@{arguments.tokens}/{number}", min(arguments.per_context, left)
            pairs = sorted(set(pairs))
            chosen = random.Random(name).sample(pairs, min(count, len(pairs)))
            yield Case(name, "\n\n".join(texts), tuple(chosen))
            left -= len(chosen)
            if left == 0:
                break
            texts, pairs, used, number = [], [], 0, number + 1


def compressed(cache: DenseCache, heads: head_scores.HeadScores | None, setting: Setting) -> RaggedCache:
    """The cache of a setting."""
    bits = None if setting.bits == 16 or setting.keys != "row" else setting.bits
    if setting.level == "pair":
        small = kvzip.compress(cache, setting.ratio, bits=bits)
    else:
        assert heads is not None
        sink, recent = (SINK, RECENT) if setting.level == "window" else (0, 0)
        by_heads = head_scores.attach(cache, heads)
        small = kvzip.compress(by_heads, setting.ratio, level="head", sink=sink, recent=recent, bits=bits)
    if setting.keys == "row":
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


def centered(x: Tensor, bits: int) -> Tensor:
    mean = x.mean(0)
    return by_row(x - mean, bits) + mean


def scaled(x: Tensor, bits: int) -> Tensor:
    mean = x.mean(0)
    spread = (x - mean).abs().amax(0).clamp(min=1e-6)
    return by_row((x - mean) / spread, bits) * spread + mean


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "channel": by_channel,
    "centered": centered,
    "scaled": scaled,
    "exact": lambda x, bits: x,
}


@torch.no_grad()
def forced(model: Model, small: RaggedCache, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], list[int]]:
    """For each question the log-likelihood of its gold answer, summed over its tokens, and how many they are."""
    tokenizer = tokenizer_of(model)
    questions, golds = [], []
    for question, gold in pairs:
        if small.chat:
            text = prompts.encode_text(tokenizer, f"{prompts.QUERY_SEPARATOR}{question}{ASK}")
            questions.append(text + prompts.encode_control(tokenizer, prompt_of(model).postfix))
            golds.append(prompts.encode_text(tokenizer, gold))
        else:
            questions.append(prompts.encode_text(tokenizer, f"{PLAIN_ASK}{question}{PLAIN_ANSWER}"))
            golds.append(prompts.encode_text(tokenizer, f" {gold}"))
    rows = [q + a[:-1] for q, a in zip(questions, golds, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    tail = empty_tail(small.context, len(rows), longest, dtype=model.dtype)
    positions = torch.arange(small.context_length, small.context_length + longest, device=model.device)
    hidden = forward(model, ids, positions, decode_attend(model.config, all_ragged(small.context), tail))
    sums = []
    for n, (question, gold) in enumerate(zip(questions, golds, strict=True)):
        first = len(question) - 1  # what follows a question's last token is the answer's first
        found = logits(model, hidden[n, first : first + len(gold)]).float().log_softmax(-1)
        wanted = torch.tensor(gold, device=model.device)[:, None]
        sums.append(round(found.gather(1, wanted).double().sum().item(), 4))
    return sums, [len(gold) for gold in golds]


def answered(model: Model, small: RaggedCache, pairs: Sequence[tuple[str, str]], tokens: int) -> str | None:
    """For each question 1 or 0: whether the generated answer contains the gold one, case and spacing apart."""
    if tokens == 0:
        return None
    queries = [question + ASK if small.chat else f"{PLAIN_ASK}{question}{PLAIN_ANSWER}" for question, _ in pairs]
    found = kvzip.generate(model, small, queries, max_tokens=tokens, template=small.chat, stop=("\n",))
    return "".join("01"[_plain(gold) in _plain(a.text)] for (_, gold), a in zip(pairs, found, strict=True))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def print_tables(lines: list[dict[str, Any]]) -> None:
    """Prints one table for each model: means with 95% bootstrap intervals over questions, differences paired."""
    if not lines:
        raise SystemExit("expected results, got none: measure first")
    console = Console()
    for model in dict.fromkeys((line["model"], line["dtype"]) for line in lines):
        own = [line for line in lines if (line["model"], line["dtype"]) == model]
        by: dict[str, dict[str, dict[str, Any]]] = {}
        for line in own:
            by.setdefault(line["setting"], {})[line["case"]] = line
        names = [setting.name for setting in SETTINGS if setting.name in by]
        shared = sorted(set.intersection(*(set(by[name]) for name in names)))
        if FULL.name not in by or not shared:
            console.print(f"{model[0]}: no context has all settings yet")
            continue
        console.print(table_of(model[0], own[0], by, names, shared))


def table_of(
    model: str, facts: dict[str, Any], by: dict[str, dict[str, dict[str, Any]]], names: list[str], shared: list[str]
) -> Table:
    """The table of one model. `gained` is the log-likelihood of a gold answer over the full cache's, in nats;
    `change` the size of its difference, either way, from 16 bits of the same pairs: noise that cancels in `gained`;
    `over row` how much larger the change is with keys quantized by rows, at the same ratio and bits."""
    count = sum(len(by[FULL.name][case]["loglik"]) for case in shared)
    title = f"{model}, {facts['dtype']} on {facts['device']}: {count} questions of {len(shared)} contexts"
    table = Table(title=title)
    for column in ("setting", "kept", "bytes", "contains gold, %", "loglik per token", "gained", "change", "over row"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    whole = gather(by[FULL.name], shared, "loglik")
    for name in names:
        lines = [by[name][case] for case in shared]
        mine, tokens = (gather(by[name], shared, field) for field in ("loglik", "answer_tokens"))
        size = "-"
        if lines[0]["nbytes"] is not None:
            size = f"{sum(line['nbytes'] / line['dense_nbytes'] for line in lines) / len(lines):.3f}"
        contained = "-"
        if all(line["contained"] is not None for line in lines):
            contained = interval(100 * gather(by[name], shared, "contained"), "{:.0f}")
        rows, wide = name.partition(", keys")[0], f"{name.partition(',')[0]}, 16 bits"
        change, over = np.abs(mine - gather(by[wide], shared, "loglik")) if wide in by else None, ""
        if change is not None and rows != name:
            over = interval(np.abs(gather(by[rows], shared, "loglik") - gather(by[wide], shared, "loglik")) - change)
        kept = sum(line["kept"] for line in lines) / len(lines)
        moved = "-" if change is None else interval(change, "{:.2f}")
        likelihood = f"{mine.sum() / tokens.sum():.3f}"
        table.add_row(name, f"{kept:.3f}", size, contained, likelihood, interval(mine - whole), moved, over)
    return table


def gather(group: dict[str, dict[str, Any]], names: Sequence[str], field: str) -> np.ndarray:
    """One number for each question of the contexts named."""
    return np.array([float(x) for name in names for x in group[name][field]])


def interval(values: np.ndarray, form: str = "{:+.2f}") -> str:
    """The mean, and its 95% interval by the bootstrap."""
    generator = np.random.default_rng(0)
    means = values[generator.integers(len(values), size=(SAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{form.format(values.mean())} [{form.format(low)}, {form.format(high)}]"


if __name__ == "__main__":
    main()
