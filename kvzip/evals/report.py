"""A report of results: a table, plots of score against ratio, heat maps of needles, and one page with all of them."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plan import FULL
from .results import Answered, Summary, by_measure, differences, group, label, read, summarize

NEEDLES = ("needle", "needles")
MEAN = "mean of tasks, relative to the full cache"
PROVENANCE = ("commit", "torch", "dtype", "device", "seed", "date")
FEW_LINES = 4
"""At most so many lines of a plot have their intervals shaded."""
_MARKERS = "osD^vP*Xh<>p"


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
    written, tables, pictures = [], [], []
    for (model, form), own in group(answers, "model", "form").items():
        title = f"{model}, {form}"
        tables.append(f"## {title}\n\n{overview(own)}\n\n{table(own, base=base)}")
        for name, figure in figures(own, title).items():
            path = directory / f"{model}-{form}-{name}.png".replace("@", "-").replace("/", "-")
            path.write_bytes(figure)
            pictures.append((f"{title}: {name}", figure))
            written.append(path)
    text = "\n\n".join(tables) + "\n\n" + provenance(answers) + "\n"
    (directory / "table.md").write_text(text, encoding="utf-8")
    (directory / "index.html").write_text(page(text, pictures), encoding="utf-8")
    return [directory / "table.md", directory / "index.html", *written]


def overview(answers: Sequence[Answered]) -> str:
    """Returns Markdown tables of mean scores (0 to 100), one for each ratio, methods down and tasks across.

    The last column is the mean over tasks relative to the full cache, in percent. The full cache is a row of each.
    """
    means = {row.group: row.mean for row in summarize(answers, "label", "method", "ratio")}
    whole = relative(answers)
    tasks, methods = ([own for (own,) in group(answers, key)] for key in ("label", "method"))
    tables = []
    for ratio in sorted({ratio for _, method, ratio in means if method != FULL}) or [1.0]:
        lines = [f"### {ratio:g} kept", "", "| method | " + " | ".join(tasks) + " | relative |"]
        lines.append("|---" * (len(tasks) + 2) + "|")
        for method in methods:
            at = 1.0 if method == FULL else ratio
            cells = [means.get((task, method, at)) for task in tasks] + [whole.get((method, at))]
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


def relative(answers: Sequence[Answered]) -> dict[tuple[str, float], float]:
    """Returns each method's mean over tasks of its score divided by the full cache's, by (method, ratio).

    Tasks that the full cache scores 0 in, and methods and ratios that were not run on all the others, are left out.
    """
    means = {row.group: row.mean for row in summarize(answers, "label", "method", "ratio")}
    full = {task: mean for (task, method, _), mean in means.items() if method == FULL and mean > 0}
    found: dict[tuple[str, float], list[float]] = {}
    for (task, method, ratio), mean in means.items():
        if task in full:
            found.setdefault((method, ratio), []).append(mean / full[task])
    return {key: sum(values) / len(values) for key, values in found.items() if len(values) == len(full)}


def figures(answers: Sequence[Answered], title: str) -> dict[str, bytes]:
    """Returns PNGs by name: "tasks", "mean" where the full cache was asked, and "heat" where needles were hidden."""
    made = {"tasks": _task_plots(answers, title)}
    if relative(answers):
        made["mean"] = _mean_plot(answers, title)
    hidden = [a for a in answers if a.question["task"].partition("@")[0] in NEEDLES]
    if hidden:
        made["heat"] = _heat_maps(hidden, title)
    return made


def page(text: str, pictures: Sequence[tuple[str, bytes]]) -> str:
    """Returns one HTML page without references to other files: pictures first, then the Markdown tables."""
    body = [
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in pictures
    ]
    for line in text.split("\n"):
        if line.startswith("|---"):
            continue
        if line.startswith("| task"):
            body.append("</table><p></p><table>")
        if line.startswith("|"):
            cells = (html.escape(cell.strip()) for cell in line.strip("|").split("|"))
            cells = (f"<b>{cell[2:-2]}</b>" if cell.startswith("**") else cell for cell in cells)
            body.append("<tr><td>" + "</td><td>".join(cells) + "</td></tr>")
        elif line.startswith(("## ", "### ")):
            level = line.index(" ")
            body.append(f"</table><h{level}>{html.escape(line[level + 1 :])}</h{level}><table>")
        elif line:
            body.append(f"</table><p>{html.escape(line)}</p>")
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto}img{max-width:100%}"
        "td{padding:.1em .8em;border-bottom:1px solid #ddd}"
    )
    joined = "\n".join(body)
    marks = '<meta charset="utf-8"><meta name="generator" content="kvzip eval">'
    return f"<!doctype html>{marks}<title>kvzip eval</title><style>{style}</style>\n{joined}\n"


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


def _task_plots(answers: Sequence[Answered], title: str) -> bytes:
    tasks = [task for (task,) in group(answers, "label")]
    columns = min(4, len(tasks))
    figure, axes = _canvas(-(-len(tasks) // columns), columns, title)
    styles = _styles(answers)
    for axis, task in zip(axes, tasks, strict=False):
        own = [answer for answer in answers if label(answer) == task]
        for (method,), asked in group(sorted(own, key=lambda answer: answer.ratio), "method").items():
            rows = summarize(asked, "ratio")
            if method == FULL:
                axis.axhline(100 * rows[0].mean, color="black", linestyle="--", label=FULL)
                continue
            ratios, means = [row.group[0] for row in rows], [100 * row.mean for row in rows]
            axis.plot(ratios, means, label=method, markersize=4, **styles[method])
            if len(styles) <= FEW_LINES:
                low, high = [100 * row.low for row in rows], [100 * row.high for row in rows]
                axis.fill_between(ratios, low, high, alpha=0.12, color=styles[method]["color"])
        axis.set(title=task, xlabel="fraction of pairs kept", ylabel="score", xlim=(0, 1.03), ylim=(-3, 103))
    return _png_with_legend(figure, axes)


def _mean_plot(answers: Sequence[Answered], title: str) -> bytes:
    figure, axes = _canvas(1, 1, title, size=(5.4, 3.8))
    styles, lines = _styles(answers), {}
    for (method, ratio), value in sorted(relative(answers).items(), key=lambda item: item[0][1]):
        lines.setdefault(method, []).append((ratio, 100 * value))
    for method, points in lines.items():
        if method != FULL:
            axes[0].plot(*zip(*points, strict=True), label=method, markersize=4, **styles[method])
    axes[0].axhline(100, color="black", linestyle="--", label=FULL)
    top = max(110.0, *(value for points in lines.values() for _, value in points))
    axes[0].set(title=MEAN, xlabel="fraction of pairs kept", ylabel="%", xlim=(0, 1.03), ylim=(-3, top + 3))
    return _png_with_legend(figure, axes)


def _heat_maps(answers: Sequence[Answered], title: str) -> bytes:
    """A map for each method (a row of maps) and ratio (a column): lengths across, depths down, green for found.

    The full cache, which has no ratio, is the first map of the last row.
    """
    maps = group(answers, "method", "ratio")
    methods = sorted((method for (method,) in group(answers, "method")), key=lambda method: method == FULL)
    ratios = sorted({ratio for method, ratio in maps if method != FULL}) or [1.0]
    figure, axes = _canvas(len(methods), len(ratios), title, size=(1.6, 1.4))
    lengths = sorted({length for length, _ in group(answers, "length", "depth")})
    depths = sorted({depth for _, depth in group(answers, "length", "depth")})
    for n, axis in enumerate(axes):
        row, column = divmod(n, len(ratios))
        full = methods[row] == FULL
        axis.set_visible(not full or column == 0)
        own = summarize(maps.get((methods[row], 1.0 if full else ratios[column]), []), "length", "depth")
        means = {summary.group: summary.mean for summary in own}
        if means:
            grid = [[means.get((length, depth), float("nan")) for length in lengths] for depth in depths]
            axis.pcolormesh(grid, vmin=0, vmax=1, cmap="RdYlGn", edgecolors="white", linewidth=1)
        lowest = row == len(methods) - 1 - (methods[-1] == FULL and column > 0)
        axis.set_xticks([x + 0.5 for x in range(len(lengths))], lengths if lowest else [])
        axis.set_yticks([y + 0.5 for y in range(0, len(depths), 5)], depths[::5] if column == 0 else [])
        axis.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
        if row == 0 and not full:
            axis.set_title(f"{ratios[column]:g} kept")
        if column == 0:
            axis.set_ylabel(methods[row], rotation=0, ha="right", va="center")
    figure.supxlabel("tokens; down: depth of the needle, %")
    return _png(figure)


def _styles(answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """The same color and marker for a method in every plot."""
    methods = [method for (method,) in group(answers, "method") if method != FULL]
    return {
        method: {"color": f"C{n % 10}", "marker": _MARKERS[n % len(_MARKERS)], "linestyle": ("-", "-.")[n // 10 % 2]}
        for n, method in enumerate(methods)
    }


def _canvas(rows: int, columns: int, title: str, *, size: tuple[float, float] = (3.6, 3.0)) -> tuple[Any, list[Any]]:
    """A figure with axes of that size in inches."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "expected matplotlib for the plots, got none: pip install matplotlib "
            "(in a checkout pip install -e '.[plot]')"
        ) from error
    figure = Figure(figsize=(1 + size[0] * columns, 0.9 + size[1] * rows), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _png_with_legend(figure: Any, axes: Sequence[Any]) -> bytes:
    """The picture of a figure with one legend for all its axes, those without a line hidden."""
    handles: dict[str, Any] = {}
    for axis in axes:
        axis.set_visible(axis.has_data())
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return _png(figure)


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
