"""Plots of an evaluation: score against ratio, a task each and in the mean, and heat maps of needles."""

import io
from collections.abc import Sequence
from typing import Any

from .plan import FULL
from .results import Answered, group, label, relative, relative_intervals, summarize

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
Styles = dict[str, dict[str, Any]]
"""How matplotlib draws each method."""


def figures(
    answers: Sequence[Answered], title: str, *, base: str = "kvzip", shown: Sequence[str] = (), across: str = KEPT
) -> dict[str, bytes]:
    """Returns PNGs by name: "tasks", "mean" where the full cache was asked, and "heat" where needles were hidden.

    `base` is drawn thick, at most five others in colors, which are those of `shown` or else the best, the rest in grey.
    `across` says what a ratio is.
    """
    styles = _styles(answers, base, shown)
    made = {"mean": _mean_plot(answers, title, styles, across)} if relative(answers) else {}
    made["tasks"] = _task_plots(answers, title, styles, across)
    hidden = [a for a in answers if a.question["task"].partition("@")[0] in NEEDLES]
    if hidden:
        made["heat"] = _heat_maps(hidden, title, across)
    return made


def _task_plots(answers: Sequence[Answered], title: str, styles: Styles, across: str) -> bytes:
    tasks = [task for (task,) in group(answers, "label")]
    columns = min(4, len(tasks))
    figure, axes = _canvas(-(-len(tasks) // columns), columns, title)
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


def _mean_plot(answers: Sequence[Answered], title: str, styles: Styles, across: str) -> bytes:
    """The mean of all tasks by ratio; the lines in colors with their intervals shaded."""
    figure, axes = _canvas(1, 1, title, size=(5.4, 3.8))
    lines: dict[str, list[tuple[float, float]]] = {}
    for (method, ratio), value in sorted(relative(answers).items(), key=lambda item: item[0][1]):
        lines.setdefault(method, []).append((ratio, 100 * value))
    spread = relative_intervals(answers)
    axes[0].axhline(100, color="black", linestyle="--", label=FULL)
    for method, style in styles.items():
        if method not in lines:
            continue
        ratios, values = zip(*lines[method], strict=True)
        axes[0].plot(ratios, values, label=_named(method, styles), markersize=5, **style)
        if "marker" in style:
            bounds = [[100 * bound for bound in spread[method, ratio]] for ratio in ratios]
            axes[0].fill_between(ratios, *zip(*bounds, strict=True), alpha=0.12, color=style["color"])
    top = max(110.0, *(value for points in lines.values() for _, value in points))
    axes[0].set(title=MEAN, xlabel=across, ylabel="%", xlim=(0, 1.03), ylim=(-3, top + 3))
    return _png_with_legend(figure, axes)


def _heat_maps(answers: Sequence[Answered], title: str, across: str) -> bytes:
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
            axis.set_title(f"{ratios[column]:g}")
        if column == 0:
            axis.set_ylabel(methods[row], rotation=0, ha="right", va="center")
    figure.supxlabel(f"tokens; down: depth of the needle, %; columns: {across}")
    return _png(figure)


def _styles(answers: Sequence[Answered], base: str, shown: Sequence[str]) -> Styles:
    """How each method is drawn in every plot: `base` thick and on top, some others in colors, the rest in grey."""
    means: dict[str, list[float]] = {}
    for row in summarize(answers, "label", "method", "ratio"):
        means.setdefault(row.group[1], []).append(row.mean)
    others = [method for method in means if method not in (FULL, base)]
    others.sort(key=lambda method: -sum(means[method]) / len(means[method]))
    room = len(_COLORS) if base in means else len(_COLORS) + 1
    wanted = [method for method in shown if method in others]
    if wanted:
        room = min(room, len(wanted))
        others = [*wanted, *(method for method in others if method not in wanted)]
    styles: Styles = {
        method: {"color": color, "marker": marker, "linewidth": 1.4, "zorder": 3}
        for method, color, marker in zip(others[:room], [*_COLORS, _BASE_COLOR], _MARKERS, strict=False)
    }
    if base in means:
        styles[base] = {"color": _BASE_COLOR, "marker": "o", "linewidth": 2.8, "zorder": 4}
    return styles | {method: {"color": "#c4c4c4", "linewidth": 1, "zorder": 1} for method in others[room:]}


def _named(method: str, styles: Styles) -> str:
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
