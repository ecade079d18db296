"""Plots of an evaluation: score against ratio, a task each and in the mean, and heat maps of needles."""

import io
from collections.abc import Sequence
from typing import Any

from .plan import FULL
from .results import Answered, group, label, summarize

NEEDLES = ("needle", "needles")
MEAN = "mean of tasks, relative to the full cache"
KEPT = "fraction of pairs kept"
FEW_LINES = 4
"""At most so many lines of a plot have their intervals shaded."""
_BASE_COLOR = "#d55e00"
_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""With the method in question and the full cache seven lines, told apart by color-blind readers too; the rest is grey.
Source: Okabe and Ito, Color Universal Design, 2008."""
_MARKERS = "sD^vPX"


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


def figures(answers: Sequence[Answered], title: str, *, base: str = "kvzip", across: str = KEPT) -> dict[str, bytes]:
    """Returns PNGs by name: "tasks", "mean" where the full cache was asked, and "heat" where needles were hidden.

    `base` is drawn thick, the five best others in colors, the rest in grey. `across` says what a ratio is.
    """
    made = {"mean": _mean_plot(answers, title, base, across)} if relative(answers) else {}
    made["tasks"] = _task_plots(answers, title, base, across)
    hidden = [a for a in answers if a.question["task"].partition("@")[0] in NEEDLES]
    if hidden:
        made["heat"] = _heat_maps(hidden, title)
    return made


def _task_plots(answers: Sequence[Answered], title: str, base: str, across: str) -> bytes:
    tasks = [task for (task,) in group(answers, "label")]
    columns = min(4, len(tasks))
    figure, axes = _canvas(-(-len(tasks) // columns), columns, title)
    styles = _styles(answers, base)
    for axis, task in zip(axes, tasks, strict=False):
        own = [answer for answer in answers if label(answer) == task]
        asked = {m: rows for (m,), rows in group(sorted(own, key=lambda answer: answer.ratio), "method").items()}
        for method in (FULL, *styles):
            if method not in asked:
                continue
            rows = summarize(asked[method], "ratio")
            if method == FULL:
                axis.axhline(100 * rows[0].mean, color="black", linestyle="--", label=FULL)
                continue
            ratios, means = [row.group[0] for row in rows], [100 * row.mean for row in rows]
            axis.plot(ratios, means, label=_named(method, styles), markersize=5, **styles[method])
            if len(styles) <= FEW_LINES:
                low, high = [100 * row.low for row in rows], [100 * row.high for row in rows]
                axis.fill_between(ratios, low, high, alpha=0.12, color=styles[method]["color"])
        axis.set(title=task, xlabel=across, ylabel="score", xlim=(0, 1.03), ylim=(-3, 103))
    return _png_with_legend(figure, axes)


def _mean_plot(answers: Sequence[Answered], title: str, base: str, across: str) -> bytes:
    figure, axes = _canvas(1, 1, title, size=(5.4, 3.8))
    styles, lines = _styles(answers, base), {}
    for (method, ratio), value in sorted(relative(answers).items(), key=lambda item: item[0][1]):
        lines.setdefault(method, []).append((ratio, 100 * value))
    axes[0].axhline(100, color="black", linestyle="--", label=FULL)
    for method in styles:
        if method in lines:
            name = _named(method, styles)
            axes[0].plot(*zip(*lines[method], strict=True), label=name, markersize=5, **styles[method])
    top = max(110.0, *(value for points in lines.values() for _, value in points))
    axes[0].set(title=MEAN, xlabel=across, ylabel="%", xlim=(0, 1.03), ylim=(-3, top + 3))
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


def _styles(answers: Sequence[Answered], base: str) -> dict[str, dict[str, Any]]:
    """How each method is drawn in every plot: `base` thick and on top, the best others in colors, the rest in grey."""
    means: dict[str, list[float]] = {}
    for row in summarize(answers, "label", "method", "ratio"):
        means.setdefault(row.group[1], []).append(row.mean)
    others = [method for method in means if method not in (FULL, base)]
    others.sort(key=lambda method: -sum(means[method]) / len(means[method]))
    room = len(_COLORS) if base in means else len(_COLORS) + 1
    shown = dict(zip(others[:room], [*_COLORS, _BASE_COLOR], strict=False))
    styles: dict[str, dict[str, Any]] = {
        method: {"color": color, "marker": _MARKERS[n], "linewidth": 1.4, "zorder": 3}
        for n, (method, color) in enumerate(shown.items())
    }
    if base in means:
        styles[base] = {"color": _BASE_COLOR, "marker": "o", "linewidth": 2.8, "zorder": 4}
    return styles | {method: {"color": "#c4c4c4", "linewidth": 1, "zorder": 1} for method in others[room:]}


def _named(method: str, styles: dict[str, dict[str, Any]]) -> str:
    """What the legend calls a method: those in grey are named together."""
    grey = [name for name, style in styles.items() if "marker" not in style]
    return method if method not in grey else "\n".join(["in grey:", *grey])


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
