"""A report of results: a table, plots of score against ratio, heat maps of needles, and one page with all of them."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from .plan import FULL
from .plots import figures
from .results import (
    Answered,
    Summary,
    by_measure,
    differences,
    group,
    read,
    relative,
    relative_intervals,
    summarize,
)

PROVENANCE = ("commit", "torch", "dtype", "device", "seed", "date")
_PHONE = 900
"""Pixels of a picture above which it is scrolled on a phone, not shrunk."""
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "img{max-width:100%;height:auto;background:#fff;border-radius:.4rem}.story{font-size:1.15rem}"
    "table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}"
    "th,td{padding:.15em .8em .15em 0;border-bottom:1px solid #8884;text-align:left;white-space:nowrap}"
    "@media(max-width:40rem){.plot img{max-width:none;width:46rem}}"
    "h2{margin-top:2rem}@media(prefers-color-scheme:dark){body{background:#15161a;color:#e9e7e2}}"
    "@media print{body{max-width:none}img,table{break-inside:avoid}}"
)


def write_report(results: Sequence[Path], directory: Path, *, base: str = "kvzip") -> list[Path]:
    """Writes the report of result files into a directory and returns the files: `table.md`, PNGs, `index.html`.

    A model's answers in one form are a section: one plot for each task with a line for each method, one of the mean
    over tasks as a fraction of the full cache's, and a heat map of lengths and depths for each method where needles
    were hidden. The table also gives each method's difference to the full cache and to `base` over the same questions.

    Raises: ValueError for results that `results.read` refuses, or none; ImportError without matplotlib.
    """
    answers = read(*results)
    if not answers:
        raise ValueError(f"expected answers in {', '.join(map(str, results))}, got none: run the evaluation first")
    directory.mkdir(parents=True, exist_ok=True)
    written, tables, pictures, told = [], [], [], []
    for (model, form), own in group(answers, "model", "form").items():
        title = f"{model}, {form}"
        whole = f"{means(own)}\n\n" if relative(own) else ""
        tables.append(f"## {title}\n\n{whole}{overview(own)}\n\n{table(own, base=base)}")
        told.append(story(own, title, base=base))
        for name, figure in figures(own, title, base=base).items():
            path = directory / f"{model}-{form}-{name}.png".replace("@", "-").replace("/", "-")
            path.write_bytes(figure)
            pictures.append((f"{title}: {name}", figure))
            written.append(path)
    text = "\n\n".join(tables) + "\n\n" + provenance(answers) + "\n"
    (directory / "table.md").write_text(text, encoding="utf-8")
    (directory / "index.html").write_text(page(text, pictures, story=told), encoding="utf-8")
    return [directory / "table.md", directory / "index.html", *written]


def means(answers: Sequence[Answered], *, across: str = "kept") -> str:
    """Returns a Markdown table of the mean over tasks relative to the full cache, in percent, with 95% intervals.

    Methods are down, ratios across, each before the word `across`.
    """
    values, spread = relative(answers), relative_intervals(answers)
    ratios = sorted({ratio for method, ratio in values if method != FULL})
    lines = [f"| method | {' | '.join(f'{ratio:g} {across}' for ratio in ratios)} |"]
    lines.append("|---" * (len(ratios) + 1) + "|")
    for (method,) in group(answers, "method"):
        cells = []
        for key in ((method, ratio) for ratio in ratios):
            low, high = spread.get(key, (0.0, 0.0))
            cells.append(f"{100 * values[key]:.0f} ({100 * low:.0f} to {100 * high:.0f})" if key in values else "")
        if method != FULL and any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def overview(answers: Sequence[Answered], *, across: str = "") -> str:
    """Returns Markdown tables of mean scores (0 to 100), one for each ratio, methods down and tasks across.

    The last column is the mean over tasks relative to the full cache, in percent. The full cache is a row of each, and
    methods without an answer at a ratio are left out. `across` says what a ratio is, if not the pairs that are kept.
    """
    scores = {row.group: row.mean for row in summarize(answers, "label", "method", "ratio")}
    whole = relative(answers)
    tasks, methods = ([own for (own,) in group(answers, key)] for key in ("label", "method"))
    tables = []
    for ratio in sorted({ratio for _, method, ratio in scores if method != FULL}) or [1.0]:
        lines = [f"### {ratio:g} {across or 'kept'}", "", "| method | " + " | ".join(tasks) + " | relative |"]
        lines.append("|---" * (len(tasks) + 2) + "|")
        for method in methods:
            at = 1.0 if method == FULL else ratio
            cells = [scores.get((task, method, at)) for task in tasks] + [whole.get((method, at))]
            if not any(x is not None for x in cells):
                continue
            lines.append(f"| {method} | " + " | ".join("" if x is None else f"{100 * x:.1f}" for x in cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def table(answers: Sequence[Answered], *, base: str = "kvzip") -> str:
    """Returns a Markdown table of scores (0 to 100, with 95% intervals), a row for each task, method and ratio.

    The last columns are the differences to the full cache and to `base` at the same ratio, over the same questions; one
    whose interval holds no 0 is bold. Where reference answers were given to the model, their mean log-likelihood, in
    nats, is a further column, and the score is how many of them greedy decoding gives.
    """
    methods = [method for (method,) in group(answers, "method")]
    keys = ("label", "method", "ratio")
    apart = {
        (*row.group, other): row
        for other in (FULL, base)
        for method in methods
        if method not in (other, FULL)
        for row in differences(answers, method=method, base=other, keys=keys)
    }
    nats = {row.group: row.mean for row in summarize(by_measure(answers, "loglik"), *keys)}
    lines = [
        f"| task | method | kept | score | 95% interval | questions (contexts) | less {FULL} | less {base} |"
        + " log-likelihood |" * bool(nats),
        "|---" * (9 if nats else 8) + "|",
    ]
    rows = summarize(answers, *keys)
    for row in sorted(rows, key=lambda row: (row.group[0], row.group[2], methods.index(row.group[1]))):
        task, method, ratio = row.group
        less = [_difference(apart.get((*row.group, other))) for other in (FULL, base)]
        lines.append(
            f"| {task} | {method} | {ratio:g} | {100 * row.mean:.1f} | {100 * row.low:.1f} to {100 * row.high:.1f} | "
            f"{row.questions} ({row.contexts}) | {less[0]} | {less[1]} |"
            + (f" {nats[row.group]:.2f} |" if row.group in nats else " |" * bool(nats))
        )
    return "\n".join(lines)


def page(text: str, pictures: Sequence[tuple[str, bytes]], *, story: Sequence[str] = ()) -> str:
    """Returns one HTML page without references to other files: the story, pictures, then the Markdown tables.

    It is as wide as its window, a phone's too, and dark where its reader wants that.
    """
    body = [f'<p class="story">{html.escape(sentence)}</p>' for sentence in story]
    for name, png in pictures:
        kind = "wide plot" if int.from_bytes(png[16:20], "big") > _PHONE else "wide"  # its width, in a PNG's header
        data = base64.b64encode(png).decode()
        body.append(f'<h2>{html.escape(name)}</h2><div class="{kind}">')
        body.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></div>')
    rows: list[str] = []

    def end_table() -> None:
        if rows:
            body.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
            rows.clear()

    for line in text.split("\n"):
        if line.startswith("|---"):
            continue
        if line.startswith(("| task", "| method")):
            end_table()
        if line.startswith("|"):
            cells = (html.escape(cell.strip()) for cell in line.strip("|").split("|"))
            cells = (f"<b>{cell[2:-2]}</b>" if cell.startswith("**") else cell for cell in cells)
            kind = "td" if rows else "th"
            rows.append("<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in cells) + "</tr>")
            continue
        end_table()
        if line.startswith(("## ", "### ")):
            level = line.index(" ")
            body.append(f"<h{level}>{html.escape(line[level + 1 :])}</h{level}>")
        elif line:
            body.append(f"<p>{html.escape(line)}</p>")
    end_table()
    joined = "\n".join(body)
    marks = '<meta charset="utf-8"><meta name="generator" content="kvzip eval">'
    marks += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    marks += '<meta name="color-scheme" content="light dark">'
    return (
        f"<!doctype html>\n<html lang=en>{marks}<title>kvzip eval</title><style>{_STYLE}</style>\n{joined}\n</html>\n"
    )


def story(answers: Sequence[Answered], title: str, *, base: str = "kvzip") -> str:
    """Returns a sentence that says what `base`, or else the best method, keeps of the full cache's score."""
    kept: dict[str, dict[float, float]] = {}
    for (method, ratio), value in relative(answers).items():
        if method != FULL:
            kept.setdefault(method, {})[ratio] = value
    if not kept:
        return f"{title}: no method was run beside the full cache on all tasks."
    method = base if base in kept else max(kept, key=lambda name: sum(kept[name].values()) / len(kept[name]))
    (most, first), *rest = sorted(kept[method].items(), reverse=True)
    parts = [f"{first:.0%} of the full cache's score with {most:.0%} of the pairs"]
    parts += [f"{value:.0%} with {ratio:.0%}" for ratio, value in rest]
    at = min(kept[method], key=lambda ratio: (abs(ratio - 0.3), ratio))
    others = sorted(((kept[name][at], name) for name in kept if name != method and at in kept[name]), reverse=True)
    beside = ", ".join(f"{name} {value:.0%}" for value, name in others[:3])
    return f"{title}: {method} keeps {', '.join(parts)}." + (f" With {at:.0%}, {beside}." if beside else "")


def provenance(answers: Sequence[Answered]) -> str:
    """Returns a line that says what made the answers: commits, versions, devices, seeds and dates."""
    runs = [own[0].run for own in group(answers, "run").values()]
    runs = [{**run, "torch": run["versions"]["torch"], "date": run["date"][:10]} for run in runs]
    parts = {name: sorted({str(run[name]) for run in runs}) for name in PROVENANCE}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in parts.items())


def _difference(difference: Summary | None) -> str:
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.1f}"
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text
