"""Tables and plot of what scopes, bits and whole heads cost, from results of the tasks `gold` and `short`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import write_between
from kvzip.evals.plan import FULL
from kvzip.evals.results import Answered, Summary, by_measure, differences, group, read, summarize

COLUMNS = 3  # of panels in the plot
DRAWN = {  # the methods in it, with their colors
    **{"context": "C0-", "chunk": "C1-", "chunk+near": "C4:", "chunk:512": "C2-", "kvzip+": "C3-"},
    **{"stream-running": "C5--", "logit": "k:", "random": "C7--"},
}
Cells = dict[tuple[str, float], str]
"""What a table says of a method at a ratio."""


def render(results: Path, docs: Path) -> None:
    """Writes the tables and the plot of docs/scoring.md, and the tables of docs/concepts.md."""
    tables = by_table(read(results / "scoring-quality.jsonl.gz"))
    parts = [f"### {model}\n\n{scoring_tables(own)}" for (model, _), own in tables.items()]
    write_between(docs / "scoring.md", "results", "\n\n".join(parts))
    plot(tables, docs / "scoring.png")
    tables = by_table(read(results / "quality-bits.jsonl.gz"))
    write_between(docs / "concepts.md", "bits", bits_table(tables))
    write_between(docs / "concepts.md", "heads", heads_table(tables))


def by_table(answers: Iterable[Answered]) -> dict[tuple[str, str], list[Answered]]:
    """The answers of each model at each length of a context."""
    tables: dict[tuple[str, str], list[Answered]] = {}
    for (model, task), own in group(answers, "model", "task").items():
        tables.setdefault((model, task.partition("@")[2]), []).extend(own)
    return tables


def parts_of(answers: Sequence[Answered]) -> tuple[list[Answered], list[Answered]]:
    """The likelihoods of reference answers, and the answers that the model gave."""
    gold = [answer for answer in answers if answer.measured]
    return gold, [answer for answer in answers if not answer.measured]


def scoring_tables(answers: Sequence[Answered]) -> str:
    """The tables of one model: methods down, ratios across. Intervals are 95% bootstraps over questions."""
    gold, short = parts_of(answers)
    nats = by_measure(gold, "loglik")
    methods = [method for (method,) in group(gold, "method") if method != FULL]

    def by_cell(rows: Iterable[Summary], cell: Callable[[Summary], str]) -> Cells:
        return {(row.group[0], row.group[1]): cell(row) for row in rows if row.group[0] != FULL}

    def less(base: str, cell: Callable[[Summary], str]) -> Cells:
        others = [method for method in methods if method != base]
        keys = ("method", "ratio")
        rows = (differences(nats, method=name, base=base, keys=keys, contexts=False) for name in others)
        return by_cell((row for own in rows for row in own), cell)

    def share(own: Sequence[Answered]) -> Cells:
        rows = summarize(own, "method", "ratio", contexts=False)
        return by_cell(rows, lambda row: f"{row.mean:.1%} ±{(row.high - row.low) / 2:.1%}")

    agreed = summarize(by_measure(gold, "agreement"), "method", "ratio")
    blocks = [
        about(gold, short),
        block('kept pairs that "context" keeps too', by_cell(agreed, lambda row: f"{row.mean:.3f}")),
        block(
            "log-likelihood of a gold answer, less than the full cache's",
            less(FULL, lambda row: f"{-row.mean:.2f}"),
        ),
        block(
            'log-likelihood against "context", 95% interval',
            less("context", lambda row: f"{row.mean:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"),
        ),
        block("gold answer decoded greedily", share(gold)),
    ]
    return "\n\n".join([*blocks, block("answer contains the gold text", share(short))] if short else blocks)


def about(gold: Sequence[Answered], short: Sequence[Answered]) -> str:
    """What one model was asked, and what its full cache answers."""
    full = [answer for answer in gold if answer.method == FULL]
    run, tokens = full[0].run, [answer.question["tokens"] for answer in full]
    form = "in plain text" if run["form"] == "cloze" else "by the chat template"
    shares = {"exact": full, "contained": [answer for answer in short if answer.method == FULL]}
    said = [f"{name} {sum(a.score for a in own) / len(own):.1%}" for name, own in shares.items() if own]
    return (
        f"{len(group(full, 'context'))} contexts of {min(tokens):,} to {max(tokens):,} tokens, {len(full)} questions; "
        f"chunk 2000, segment 2000; {run['dtype']} on {run['device']}; questions {form}. Full cache: {', '.join(said)}."
    )


def block(title: str, cells: Cells) -> str:
    """A Markdown table of cells; ratios that none has are left out."""
    ratios = sorted({ratio for _, ratio in cells})
    lines = [f"| {title} | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |", "| --- |" + " ---: |" * len(ratios)]
    for method in dict.fromkeys(method for method, _ in cells):
        lines.append(f"| {method} | " + " | ".join(cells.get((method, ratio), "-") for ratio in ratios) + " |")
    return "\n".join(lines)


def bits_table(tables: dict[tuple[str, str], list[Answered]]) -> str:
    """Bytes, answers and likelihood of 16, 8 and 4 bits by ratio."""
    lines = ["| model, questions | ratio | bytes | contains the gold text, % | log-likelihood gained |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for (model, _), own in tables.items():
        count = len([answer for answer in parts_of(own)[0] if answer.method == FULL])
        for ratio in (1.0, 0.5, 0.3):
            cells = zip(*(in_short(own, f"{bits} bits", ratio) for bits in (16, 8, 4)), strict=True)
            lines.append(f"| {model}, {count} | {ratio:g} | " + " | ".join(" / ".join(cell) for cell in cells) + " |")
    return "\n".join(lines)


def heads_table(tables: dict[tuple[str, str], list[Answered]]) -> str:
    """Bytes, answers and likelihood of pairs, of whole heads, and of heads where dropped ones keep their ends."""
    lines = ["| model | pairs at 0.6 | heads at 0.6 | and 16 first, 64 latest tokens of dropped heads |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for (model, _), own in tables.items():
        found = [in_short(own, method, 0.6) for method in ("16 bits", "heads", "heads and ends")]
        lines.append(f"| {model} | " + " | ".join("{} of bytes, {}%, {}".format(*cell) for cell in found) + " |")
    return "\n".join(lines)


def in_short(answers: Sequence[Answered], method: str, ratio: float) -> tuple[str, str, str]:
    """Bytes as a share of the full cache's, percent of answers with the gold text, and log-likelihood gained."""
    own = [answer for answer in answers if answer.method == FULL or (answer.method, answer.ratio) == (method, ratio)]
    gold, short = parts_of(own)
    (gained,) = differences(by_measure(gold, "loglik"), method=method, base=FULL, contexts=False)
    bytes_of = {row.group: row.mean for row in summarize(by_measure(gold, "bytes"), "context", "method")}
    shares = [bytes_of[context, method] / bytes_of[context, FULL] for (context,) in group(gold, "context")]
    found = [answer.score for answer in short if answer.method == method]
    contained = 100 * sum(found) / len(found)
    return f"{sum(shares) / len(shares):.3f}", f"{contained:.0f}", f"{gained.mean:+.2f}"


def plot(tables: dict[tuple[str, str], list[Answered]], path: Path) -> None:
    """Log-likelihood lost by ratio, a panel for each table, a line for each of the methods that matter most."""
    from matplotlib.figure import Figure

    rows = -(-len(tables) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.9 * rows))
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axis in axes[len(tables) :]:
        axis.remove()
    lines: dict[str, Any] = {}
    for axis, ((model, length), answers) in zip(axes, tables.items(), strict=False):
        nats = by_measure(answers, "loglik")
        for method, style in DRAWN.items():
            lost = differences(nats, method=method, base=FULL, keys=("ratio",), contexts=False)
            points = sorted((row.group[0], -row.mean, -row.high, -row.low) for row in lost)
            if not points:
                continue
            ratio, mean, low, high = zip(*points, strict=True)
            (lines[method],) = axis.plot(ratio, mean, style, marker=".", linewidth=1.5)
            if method in ("context", "chunk"):
                axis.fill_between(ratio, low, high, color=lines[method].get_color(), alpha=0.12)
        axis.set_title(f"{model}, about {int(length):,} tokens", fontsize=10)
        axis.set(xlabel="ratio kept", ylabel="log-likelihood lost, gold answer (nats)")
        axis.grid(alpha=0.3)
    figure.legend(list(lines.values()), list(lines), loc="lower center", ncol=len(lines))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=100, format="png")
