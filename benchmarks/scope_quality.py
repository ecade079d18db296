"""What each way of scoring costs in answers: kept pairs, likelihood of the gold answers, and answers, by ratio.

    python benchmarks/scope_quality.py --model DIR --data FILE.jsonl [FILE.jsonl ...] --out RESULTS.jsonl
    python benchmarks/scope_quality.py --report --out RESULTS.jsonl --docs docs

Each line of a data file has `context`, `question` and `answers`, lists of equal length. Contexts are joined up to
--tokens, prefilled once, and scored by every method; each ratio then answers the same questions. One JSON line is
appended for each (model, context, method, ratio); lines that are there already are not made again, so a run may be
interrupted. Gold answers are teacher-forced in batches: `loglik` is the sum over an answer's tokens for each question,
`exact` whether every token was the most likely one; `contained`, of the first --answers questions, whether the answer
that was generated contains the gold text.

Methods: context, chunk (the scopes, at --chunk); chunk:N (another chunk size); context:N; chunk+near (with the chunk
before it in sight); logit, kvzip+ (scope chunk); positions (scope chunk, repeats placed at the end of their segment);
stream-segment, stream-running, stream-final (prefill_compressed, by how segments share the budget), stream-unknown
("running", repeats at the end of their segment); random; full.
"""

import argparse
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import kvzip
from kvzip import prompts
from kvzip.attention import decode_attend
from kvzip.cache import DenseCache, RaggedCache, RaggedKV, all_ragged, as_ragged, empty_tail
from kvzip.inputs import prompt_of, tokenizer_of
from kvzip.models import Model, forward, logits
from kvzip.scoring import score_chunks

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
METHODS = (
    *("context", "chunk", "chunk+near", "chunk:512", "chunk:1024", "chunk:4096", "chunk:8192", "context:512"),
    *("kvzip+", "logit", "positions", "stream-segment", "stream-running", "stream-final", "stream-unknown", "random"),
)
ASK = " Answer with a few words of the text."
PLAIN_ASK, PLAIN_ANSWER = "\n\nQuestion: ", "\nAnswer:"
BATCH = 64  # questions of a forward pass
SAMPLES = 2_000  # of the bootstrap
COLUMNS = 3  # of panels in the plot
DRAWN = {  # and the methods in it, with their colors
    **{"context": "C0-", "chunk": "C1-", "chunk+near": "C4:", "chunk:512": "C2-", "kvzip+": "C3-"},
    **{"stream-running": "C5--", "logit": "k:", "random": "C7--"},
}

Score = dict[str, Any]


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
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=6_000, help="context tokens, about")
    parser.add_argument("--contexts", type=int, default=100, help="at most so many contexts of each file")
    parser.add_argument("--questions", type=int, default=100, help="questions of each context")
    parser.add_argument("--answers", type=int, default=0, help="questions of each context that are answered in full")
    parser.add_argument("--chunk", type=int, default=2_000)
    parser.add_argument("--segment", type=int, default=2_000, help="of prefill_compressed")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--plain", action="store_true", help="ask in plain text, without the model's chat template")
    parser.add_argument("--answer-ratios", nargs="+", type=float, default=[0.3], help="where --answers are asked for")
    parser.add_argument("--stream-ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5], help="of stream-*")
    parser.add_argument("--max-length", type=int, default=None, help="positions, in place of the model's own limit")
    parser.add_argument("--commit", default=None, help="what is measured, where git cannot say it")
    parser.add_argument("--report", action="store_true", help="make table and plot of the results, and stop")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.out, arguments.docs)
        return
    if not arguments.model or not arguments.data:
        parser.error("expected --model and --data, or --report")
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Appends the lines that the results lack."""
    console = Console(stderr=True)
    cuda = torch.cuda.is_available() if arguments.device is None else arguments.device.startswith("cuda")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    model = kvzip.load(arguments.model, dtype=dtype, device=arguments.device, max_length=arguments.max_length)
    facts = {
        "model": Path(arguments.model).name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "chunk": arguments.chunk,
        "segment": arguments.segment,
        "plain": arguments.plain,
        "asked": arguments.tokens,
        "torch": torch.__version__,
        "kvzip": kvzip.__version__,
        "commit": arguments.commit or commit(),
    }
    done = {key_of(line) for line in read(arguments.out)}
    for path in arguments.data:
        for case in list(cases(model, path, arguments))[: arguments.contexts]:
            begin = time.perf_counter()
            for line in lines_of(model, case, facts, done, arguments):
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            console.print(f"{facts['model']} {case.name}: {time.perf_counter() - begin:.0f} s")


def setting_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What lines must share to stand in one table; `asked` are the context tokens asked for."""
    return tuple(line[name] for name in ("model", "dtype", "device", "asked", "chunk", "segment", "plain"))


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two lines the same measurement."""
    return (*setting_of(line), line["case"], line["method"], line["ratio"])


def commit() -> str:
    """The commit that is measured, with a mark if files differ from it."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def cases(model: Model, path: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    """Joins the contexts of a data file, in order, up to the tokens asked for; a rest of less than half is left out."""
    texts: list[str] = []
    pairs: list[tuple[str, str]] = []
    used = number = 0
    for row in read(path):
        length = len(prompts.encode_text(tokenizer_of(model), row["context"]))
        if used + length > 1.25 * arguments.tokens and used:
            yield pick(path, number, texts, pairs, arguments.questions)
            texts, pairs, used, number = [], [], 0, number + 1
        texts.append(row["context"])
        pairs += zip(row["question"], row["answers"], strict=True)
        used += length
        if used >= arguments.tokens:
            yield pick(path, number, texts, pairs, arguments.questions)
            texts, pairs, used, number = [], [], 0, number + 1
    if used > arguments.tokens / 2:
        yield pick(path, number, texts, pairs, arguments.questions)


def pick(path: Path, number: int, texts: list[str], pairs: list[tuple[str, str]], count: int) -> Case:
    pairs = sorted(set(pairs))
    chosen = random.Random(0).sample(pairs, min(count, len(pairs)))
    return Case(f"{path.stem}/{number}", "\n\n".join(texts), tuple(chosen))


def lines_of(
    model: Model, case: Case, facts: dict[str, Any], done: set[tuple[Any, ...]], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Measures one context with every method and ratio that is not done."""
    todo: dict[str, list[float]] = {"full": [1.0], **{method: arguments.ratios for method in arguments.methods}}
    for method, ratios in todo.items():
        if method.startswith("stream-"):
            ratios = [ratio for ratio in arguments.stream_ratios if ratio in ratios]
        keys = {ratio: key_of({**facts, "case": case.name, "method": method, "ratio": ratio}) for ratio in ratios}
        todo[method] = [ratio for ratio in ratios if keys[ratio] not in done]
    if not any(todo.values()):
        return
    cache = kvzip.prefill(model, case.context, template=model.template is not None and not arguments.plain)
    paper = score_chunks(model, cache, scope="context", method="kvzip", chunk=arguments.chunk, hint=8)
    for method, ratios in track(todo.items(), description=case.name):
        if not ratios:
            continue
        try:
            compressed = compressor(model, case, cache, paper, method, arguments)
        except ValueError as error:  # a repeat that is too long for the model
            Console(stderr=True).print(f"{method} left out: {error}")
            continue
        for ratio in ratios:
            small = compressed(ratio)
            yield {
                **facts,
                "case": case.name,
                "tokens": cache.length,
                "method": method,
                "ratio": ratio,
                "kept": small.kept / small.total,
                "agreement": agreement(small, paper, ratio),
                **answered(model, small, case, arguments.answers if ratio in (1.0, *arguments.answer_ratios) else 0),
            }


def compressor(
    model: Model, case: Case, cache: DenseCache, paper: Tensor, method: str, arguments: argparse.Namespace
) -> Callable[[float], RaggedCache]:
    """What makes the cache of a ratio by a method; scoring, where one serves all ratios, is done here."""
    base, _, size = method.partition(":")
    chunk = int(size) if size else arguments.chunk
    streaming = {"segment": arguments.segment, "chunk": chunk, "template": cache.chat}
    if base == "full":
        return lambda _: as_ragged(cache)
    if base == "stream-unknown":
        return lambda ratio: kvzip.prefill_compressed(model, iter([case.context]), ratio, **streaming)
    if base.startswith("stream-"):
        share = base.removeprefix("stream-")
        return lambda ratio: kvzip.prefill_compressed(model, case.context, ratio, share=share, **streaming)
    if base == "positions":  # nothing is dropped, so only the repeat's positions differ from scope "chunk"
        values = kvzip.prefill_compressed(model, iter([case.context]), 1.0, **streaming).scores.values.to(model.device)
    elif base == "random":
        values = torch.rand(paper.shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    elif method == "context":
        values = paper
    else:
        scoring: Score = {"scope": "context" if base == "context" else "chunk", "chunk": chunk, "hint": 8}
        scoring["method"] = base if base in ("logit", "kvzip+") else "kvzip"
        values = score_chunks(model, cache, **scoring, neighbors=chunk if base == "chunk+near" else 0)
    layers = tuple(i for i, spec in enumerate(model.config.layers) if spec.window is None)
    scores = kvzip.Scores(values, layers, cache.start, cache.length, method)
    return lambda ratio: kvzip.compress(replace(cache, scores=scores), ratio)


def agreement(small: RaggedCache, paper: Tensor, ratio: float) -> float:
    """The share of the pairs kept by the paper's scores that this cache keeps too."""
    wanted = kvzip.ops.select(paper, ratio=ratio)
    held = torch.zeros_like(wanted)
    for index, layer in enumerate(layer for layer in small.context if isinstance(layer, RaggedKV)):
        heads = torch.repeat_interleave(layer.offsets.diff().long())
        own = layer.positions >= small.start
        held[index, heads[own], layer.positions[own].long() - small.start] = True
    return ((held & wanted).sum() / wanted.sum()).item()


def answered(model: Model, small: RaggedCache, case: Case, answers: int) -> dict[str, Any]:
    """The likelihood of each gold answer after its question, and the answers to some of them."""
    loglik, exact = [], []
    for at in range(0, len(case.pairs), BATCH):
        sums, hits = forced(model, small, case.pairs[at : at + BATCH])
        loglik += sums
        exact += hits
    found: dict[str, Any] = {"loglik": [round(x, 3) for x in loglik], "exact": "".join("01"[hit] for hit in exact)}
    asked = case.pairs[:answers]
    if asked:
        queries = [question + ASK for question, _ in asked]
        if not small.chat:
            queries = [f"{PLAIN_ASK}{question}{PLAIN_ANSWER}" for question, _ in asked]
        texts = kvzip.generate(model, small, queries, max_tokens=16, template=small.chat, stop=("\n",))
        hits = [gold.lower() in answer.text.lower() for (_, gold), answer in zip(asked, texts, strict=True)]
        found["contained"] = "".join("01"[hit] for hit in hits)
    return found


@torch.no_grad()
def forced(model: Model, small: RaggedCache, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], list[bool]]:
    """For each question the log-likelihood of its answer's tokens, and whether each was the most likely one."""
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
    places = [(n, len(q) - 1 + i) for n, (q, a) in enumerate(zip(questions, golds, strict=True)) for i in range(len(a))]
    owner, column = torch.tensor(places, device=model.device).T
    found = logits(model, hidden[owner, column]).float().log_softmax(-1)
    wanted = torch.tensor([token for gold in golds for token in gold], device=model.device)
    taken = found.gather(1, wanted[:, None])[:, 0].double()
    sums = torch.zeros(len(rows), dtype=torch.float64, device=model.device).index_add(0, owner, taken)
    wrong = torch.zeros_like(sums).index_add(0, owner, (found.argmax(-1) != wanted).double())
    return sums.tolist(), (wrong == 0).tolist()


def report(path: Path, docs: Path) -> None:
    """Writes docs/scoring.md's table and plot from the results."""
    lines = read(path)
    if not lines:
        raise ValueError(f"expected results in {path}, got none: measure first")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(setting_of(line), []).append(line)
    text = [f"### {group[0]['model']}\n\n" + markdown(summary(group), group) for group in groups.values()]
    begin, end = "<!-- results:start -->", "<!-- results:end -->"
    target = docs / "scoring.md"
    page = target.read_text(encoding="utf-8")
    head, tail = page.split(begin)[0], page.split(end)[1]
    target.write_text(head + begin + "\n" + "\n\n".join(text) + "\n" + end + tail, encoding="utf-8")
    plot(list(groups.values()), docs / "scoring.png")


Summary = dict[tuple[str, float], dict[str, Any]]


def summary(lines: list[dict[str, Any]]) -> Summary:
    """For each method and ratio: agreement, the mean log-likelihood lost against the full cache, and accuracy.

    `lost` has the 95% interval of a bootstrap over questions, `against` that of the difference from "context" of the
    same ratio on the same questions (positive: better than "context").
    """
    generator = np.random.default_rng(0)
    by: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for line in lines:
        by.setdefault((line["method"], line["ratio"]), {})[line["case"]] = line
    full = by[("full", 1.0)]
    found: Summary = {}
    for (method, ratio), group in by.items():
        shared = sorted(set(group) & set(full))
        mine, whole = (gather(which, shared, "loglik") for which in (group, full))
        row: dict[str, Any] = {"questions": len(mine), "agreement": np.mean([group[c]["agreement"] for c in shared])}
        row["lost"] = interval(whole - mine, generator)
        row["exact"] = interval(gather(group, shared, "exact"), generator)
        if all("contained" in group[c] for c in shared):
            row["contained"] = interval(gather(group, shared, "contained"), generator)
        paper = by.get(("context", ratio), {})
        if set(shared) <= set(paper):
            row["against"] = interval(mine - gather(paper, shared, "loglik"), generator)
        found[method, ratio] = row
    return found


def gather(group: dict[str, dict[str, Any]], names: Sequence[str], field: str) -> np.ndarray:
    return np.array([float(x) for name in names for x in group[name][field]])


def interval(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float, float]:
    """The mean, and its 95% interval by the bootstrap."""
    means = values[generator.integers(len(values), size=(SAMPLES, len(values)))].mean(1)
    return values.mean().item(), *np.percentile(means, [2.5, 97.5]).tolist()


def markdown(table: Summary, lines: list[dict[str, Any]]) -> str:
    """The table of one model: rows are methods, columns ratios."""
    ratios = sorted({ratio for method, ratio in table if method != "full"})
    methods = [m for m in dict.fromkeys(method for method, _ in table) if m != "full"]
    full, first = table["full", 1.0], lines[0]
    contained = f", contained {full['contained'][0]:.1%}" if "contained" in full else ""
    text = [
        f"{len({line['case'] for line in lines})} contexts of {min(line['tokens'] for line in lines):,} to "
        f"{max(line['tokens'] for line in lines):,} tokens, {full['questions']} questions; chunk {first['chunk']}, "
        f"segment {first['segment']}; {first['dtype']} on {first['device']}; questions "
        f"{'in plain text' if first['plain'] else 'by the chat template'}. Full cache: exact {full['exact'][0]:.1%}"
        f"{contained}.",
        "",
    ]

    def block(title: str, cell: Callable[[dict[str, Any]], str], chosen: Sequence[str]) -> None:
        cells = {m: [cell(table[m, r]) if (m, r) in table else "-" for r in ratios] for m in chosen}
        filled = [n for n in range(len(ratios)) if any(row[n] != "-" for row in cells.values())]
        text.extend([f"| {title} | " + " | ".join(f"{ratios[n]:g}" for n in filled) + " |"])
        text.append("| --- |" + " ---: |" * len(filled))
        text.extend(f"| {method} | " + " | ".join(row[n] for n in filled) + " |" for method, row in cells.items())
        text.append("")

    block('kept pairs that "context" keeps too', lambda row: f"{row['agreement']:.3f}", methods)
    block("log-likelihood of a gold answer, less than the full cache's", lambda row: f"{row['lost'][0]:.2f}", methods)

    def against(row: dict[str, Any]) -> str:
        mean, low, high = row["against"]
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" if "against" in row else "-"

    block('log-likelihood against "context", 95% interval', against, [m for m in methods if m != "context"])

    def accuracy(field: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[field][0]:.1%} ±{(row[field][2] - row[field][1]) / 2:.1%}" if field in row else "-"

    block("gold answer decoded greedily", accuracy("exact"), methods)
    if "contained" in full:
        block("answer contains the gold text", accuracy("contained"), methods)
    return "\n".join(text).strip()


def plot(groups: Sequence[list[dict[str, Any]]], path: Path) -> None:
    """Log-likelihood lost by ratio, a panel for each table, a line for each of the methods that matter most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(groups) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(5.2 * COLUMNS, 3.9 * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    lines: dict[str, Any] = {}
    for axis, group in zip(axes.flat, groups, strict=False):
        table = summary(group)
        for method, style in DRAWN.items():
            points = sorted((ratio, *row["lost"]) for (name, ratio), row in table.items() if name == method)
            if not points:
                continue
            ratio, mean, low, high = map(np.array, zip(*points, strict=True))
            (lines[method],) = axis.plot(ratio, mean, style, marker=".", linewidth=1.5)
            if method in ("context", "chunk"):
                axis.fill_between(ratio, low, high, color=lines[method].get_color(), alpha=0.12)
        axis.set_title(f"{group[0]['model']}, about {group[0]['asked']:,} tokens", fontsize=10)
        axis.set(xlabel="ratio kept", ylabel="log-likelihood lost, gold answer (nats)")
        axis.grid(alpha=0.3)
    figure.legend(list(lines.values()), list(lines), loc="lower center", ncol=len(lines))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
