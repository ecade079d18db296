"""A comparison on a terminal."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..display import visible, visible_line
from .comparison import AnswerPair, Comparison


def unchanged(comparison: Comparison) -> int:
    """Returns how many questions have the same answer from both caches."""
    return sum(pair.full.text == pair.small.text for pair in comparison.answers)


def render(comparison: Comparison) -> RenderableType:
    """Returns the comparison for a terminal: a line that says it all, sizes and times, then each question.

    No text of the document, the questions or the answers steers the terminal (see `display`).
    """
    c = comparison
    full_mb, small_mb = c.full_bytes / 1e6, c.small_bytes / 1e6
    verdict = f"{unchanged(c)} of {len(c.answers)} answers unchanged; {full_mb:.3g} -> {small_mb:.3g} MB"
    name = visible_line(Path(c.model).name if Path(c.model).is_dir() else c.model)
    about = f"{name}: {c.tokens:,} tokens, {c.method} keeps {c.kept:,} of {c.total:,} pairs ({c.kept / c.total:.1%})"
    sizes = Table("", "full", "compressed", box=None, pad_edge=False)
    sizes.add_row("cache, MB", f"{full_mb:.2f}", f"{small_mb:.2f}")
    sizes.add_row("reading the document, s", f"{c.prefill_s:.2f}", "the same")
    sizes.add_row("scoring and packing, s", "", f"{c.score_s:.2f} + {c.compress_s:.2f}")
    full_s, small_s = sum(pair.full_s for pair in c.answers), sum(pair.small_s for pair in c.answers)
    sizes.add_row("answering, s", f"{full_s:.2f}", f"{small_s:.2f}")
    legend = (
        "Points are hundredths of a probability, compressed minus full, over the tokens of the full cache's answer: "
        "+5 is from 40% to 45%."
    )
    return Group(Text(verdict, "bold"), Text(about), "", sizes, *map(_render_pair, c.answers), "", Text(legend))


def _render_pair(pair: AnswerPair) -> Group:
    same = pair.full.text == pair.small.text
    texts = Table(show_header=False)
    texts.add_row("both" if same else "full", Text(visible(pair.full.text)))
    if not same:
        texts.add_row("compressed", Text(visible(pair.small.text)))
    parts: list[RenderableType] = [Text("\n" + visible(pair.query), "bold"), texts]
    spreads = {"p of its tokens": pair.p_answer, "lead over the next": pair.margin, "p of any token": pair.p}
    moved = Table("moved", "lowest, points", "highest, points", "mean size, points", box=None, pad_edge=False)
    for name, spread in spreads.items():
        if spread is not None:
            moved.add_row(name, _points(spread.low), _points(spread.high), _points(spread.mean_abs).removeprefix("+"))
    if moved.row_count:
        parts += ["", moved]
    if pair.changes:
        heads = ("token", "full says", "full, %", "compressed, %", "compressed says", "full, %", "compressed, %")
        changes = Table(*heads, box=None, pad_edge=False)
        for change in pair.changes:
            (own, others), (own_small, others_small) = change.full_p, change.small_p
            first = (_quoted(change.full), f"{own:.1%}"[:-1], f"{own_small:.1%}"[:-1])
            second = (_quoted(change.small), f"{others:.1%}"[:-1], f"{others_small:.1%}"[:-1])
            changes.add_row(str(change.position), *first, *second)
        parts += ["", changes]
    return Group(*parts)


def _points(difference: float) -> str:
    """A difference of probabilities in hundredths, as +22.4; what rounds to nothing is said to be small."""
    points = 100 * difference
    return "0" if not points else f"{'-' if points < 0 else '+'}<0.1" if abs(points) < 0.05 else f"{points:+.1f}"


def _quoted(token: str) -> Text:
    return Text(visible_line(repr(token)))
