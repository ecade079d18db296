"""Draws the pictures of docs/ that explain: the way of a document, ragged heads, what a fit does, the
server, documents in vLLM.

    python tools/make_pictures.py

Each is an SVG on a card of its own color, so that it reads on light and dark pages. tests/test_docs.py fails when a
file is not what this draws, or when its text is too small or leaves the card.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
CARD, INK, GREY, LINE = "#f6f8fa", "#1f2328", "#59636e", "#8c959f"
BLUE, PALE, ORANGE, SAND = "#0969da", "#ddf4ff", "#bc4c00", "#fff1e5"
Lines = tuple[str, str]


@dataclass(frozen=True)
class Picture:
    """An SVG in the making: `parts` are its elements, the earlier ones below."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, *, size: int = 14, color: str = INK, anchor: str = "start") -> None:
        """Writes one line, its baseline at `y`; `**words**` as a whole is bold."""
        weight = ' font-weight="600"' if words.startswith("**") else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
            f"{escape(words.strip('*'))}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = "#ffffff", edge: str = LINE) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{edge}"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>')

    def arrow(self, *points: tuple[float, float], color: str = GREY) -> None:
        """A line through the points, with a head at the last."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        head = "head" if color == GREY else "blue"
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.5" marker-end="url(#{head})"/>'
        )

    def labelled(self, x: float, y: float, width: float, height: float, lines: Iterable[str], **box: str) -> None:
        """A box with lines in its middle, the first bold."""
        self.box(x, y, width, height, **box)
        lines = list(lines)
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for row, line in enumerate(lines):
            words, color = (f"**{line}**", INK) if row == 0 else (line, GREY)
            self.text(x + width / 2, top + 18 * row, words, size=14 if row == 0 else 13, color=color, anchor="middle")

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
            for name, color in (("head", GREY), ("blue", BLUE))
        )
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        )
        card = f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{CARD}"/>'
        body = (opening, f"<title>{escape(self.title)}</title>", f"<defs>{heads}</defs>", card, *self.parts, "</svg>")
        return "\n".join(body) + "\n"


def way() -> Picture:
    """The way of a document: four stages, the caches between them, and what is done how often."""
    page = Picture(800, 250, "The way of a document")
    stages = (
        ("prefill", "reads the text,", "keeps all pairs"),
        ("score", "repeats the text,", "looks at pairs"),
        ("compress", "packs the best,", "drops the others"),
        ("refit, if asked", "fits what is left", "to the whole"),
    )
    page.text(24, 34, "**once for a document**", color=BLUE)
    for n, lines in enumerate(stages):
        x = 24 + 148 * n
        page.labelled(x, 50, 130, 78, lines)
        page.arrow((x + 130, 89), (x + 147, 89))
    page.text(618, 34, "**for every question**", color=ORANGE)
    for n, words in enumerate(("Who signed it?", "When?", "Who is paid?")):
        page.box(618, 50 + 28 * n, 158, 22, fill=SAND, edge=ORANGE)
        page.text(697, 66 + 28 * n, words, size=13, anchor="middle")
    page.text(24, 166, "full cache", size=13, color=GREY)
    page.bar(112, 154, 504, 16, LINE)
    page.text(24, 194, "kept, at 0.3", size=13, color=GREY)
    page.bar(112, 182, 151, 16, BLUE)
    page.arrow((263, 190), (697, 190), (697, 136), color=BLUE)
    page.text(275, 210, "frozen: read by each question, or saved to a file", size=13, color=GREY)
    page.text(24, 234, "The document is never read again, and the full cache is gone.", size=13, color=GREY)
    return page


ROWS = (  # scores of 16 tokens in three heads, drawn so that each shape of head is there
    (9, 2, 1, 8, 1, 7, 9, 1, 2, 8, 9, 1, 7, 2, 9, 8),
    (8, 1, 2, 1, 1, 3, 1, 2, 1, 1, 7, 1, 2, 1, 1, 3),
    (9, 1, 1, 7, 2, 1, 1, 8, 1, 2, 1, 1, 7, 1, 2, 1),
)
KEPT = 7  # the least score that is kept


def ragged() -> Picture:
    """Heads before and after: what is kept moves together, head after head."""
    page = Picture(800, 268, "Ragged heads")
    page.text(24, 34, "**one layer of the full cache: each square is the pair of a token**")
    for head, scores in enumerate(ROWS):
        y = 50 + 30 * head
        page.text(24, y + 16, f"head {head}", size=13, color=GREY)
        for token, score in enumerate(scores):
            page.box(84 + 30 * token, y, 24, 22, fill=_blue(head) if score >= KEPT else "#ffffff")
            color = "#ffffff" if score >= KEPT else GREY
            page.text(96 + 30 * token, y + 16, f".{score}", size=13, color=color, anchor="middle")
    page.text(580, 66, "numbers: scores, the most", size=13, color=GREY)
    page.text(580, 84, "attention while repeating.", size=13, color=GREY)
    page.text(580, 110, "The best of all heads", size=13, color=GREY)
    page.text(580, 128, f"are kept: here .{KEPT} or more.", size=13, color=GREY)
    page.text(24, 172, "**after compress: packed, and the rest is removed from memory**")
    x = 84
    for head, scores in enumerate(ROWS):
        kept = [token for token, score in enumerate(scores) if score >= KEPT]
        for row, token in enumerate(kept):
            page.box(x + 30 * row, 188, 24, 22, fill=_blue(head))
            page.text(x + 12 + 30 * row, 204, str(token), size=13, color="#ffffff", anchor="middle")
        page.text(x, 230, f"head {head}", size=13, color=GREY)
        x += 30 * len(kept)
    page.text(24, 204, "rows", size=13, color=GREY)
    words = "numbers: positions, which stay those of the tokens. offsets says where each head begins."
    page.text(24, 254, words, size=13, color=GREY)
    return page


def _blue(head: int) -> str:
    return ("#0550ae", BLUE, "#1a6e8e")[head]


def refit() -> Picture:
    """One query's attention over five keys: with all, without two of them, and with a fit."""
    page = Picture(800, 268, "What a fit does")
    columns = (
        ("all pairs", (30, 30, 12, 8, 20), "what the query sees", "of the document"),
        ("compress", (0, 52, 0, 14, 34), "two pairs are gone: the softmax", "gives too much to the others"),
        ("compress and refit", (0, 60, 0, 20, 20), "a bias lets each row stand for", "those that it is like"),
    )
    for n, (name, shares, *lines) in enumerate(columns):
        x = 24 + 256 * n
        page.box(x, 16, 240, 236)
        page.text(x + 14, 42, f"**{name}**", color=BLUE if n == 2 else INK)
        for row, words in enumerate(lines):
            page.text(x + 14, 62 + 18 * row, words, size=13, color=GREY)
        for key, share in enumerate(shares):
            y, last = 96 + 30 * key, key == len(shares) - 1
            page.text(x + 14, y + 15, "rest" if last else f"key {key + 1}", size=13, color=GREY)
            if share:
                page.bar(x + 66, y, 2 * share, 20, ORANGE if last else BLUE)
                page.text(x + 74 + 2 * share, y + 15, f"{share}%", size=13)
            else:
                page.text(x + 66, y + 15, "removed", size=13, color=GREY)
    return page


def vllm() -> Picture:
    """What a step of vLLM reads with the plugin, and where a document comes from."""
    page = Picture(800, 286, "Documents in vLLM")
    page.text(24, 34, "**requests**", color=ORANGE)
    asked = (("Who signed it?", "contract"), ("When?", "contract"), ("Who pays?", "lease"))
    _step(
        page,
        [(words, f"document: {name}") for words, name in asked],
        "a step of vLLM, in every layer",
        ("vLLM's pages", "the questions and answers"),
        ("kvzip's documents", "each read once for all of them"),
        ("merged", "by their log-sum-exp"),
    )
    page.arrow((389, 221), (389, 173), color=BLUE)
    page.labelled(276, 222, 226, 46, ("contract.kvz, lease.kvz", "loaded once, no pages spent"), fill=PALE, edge=BLUE)
    page.labelled(24, 222, 176, 46, ("kvzip compress", "before, on any machine"))
    page.arrow((200, 245), (275, 245))
    page.text(520, 240, "Nothing of a document is sent,", size=13, color=GREY)
    page.text(520, 258, "tokenized or prefilled again.", size=13, color=GREY)
    return page


def server() -> Picture:
    """A step of the engine, who waits for it, and where documents are meanwhile."""
    page = Picture(800, 300, "The server")
    page.text(24, 34, "**readers**", color=ORANGE)
    asked = (("Who built it?", "guide"), ("How high is it?", "guide"), ("Who pays?", "lease"))
    _step(
        page,
        [(words, f"model: small:{name}") for words, name in asked],
        "a step of the engine: one token for each who answers",
        ("new questions", "read a portion at a time"),
        ("documents on the GPU", "each read once for all of them"),
        ("next tokens", "sent as they come"),
    )
    page.labelled(276, 232, 226, 50, ("in the host's memory", "asked less lately"), fill=PALE, edge=BLUE)
    page.labelled(560, 232, 200, 50, ("files", "there after a restart"), fill=PALE, edge=BLUE)
    page.arrow((370, 231), (370, 173), color=BLUE)
    page.arrow((408, 173), (408, 231))
    page.arrow((559, 250), (503, 250), color=BLUE)
    page.arrow((503, 268), (559, 268))
    page.text(424, 206, "moved to make room, never while it is read", size=13, color=GREY)
    page.text(24, 218, "A reader joins and leaves", size=13, color=GREY)
    page.text(24, 236, "between two steps; no one", size=13, color=GREY)
    page.text(24, 254, "waits for the slowest.", size=13, color=GREY)
    return page


def _step(page: Picture, asked: Sequence[Lines], title: str, above: Lines, below: Lines, result: Lines) -> None:
    """Three questions, and a step that reads what is `above` and the documents `below` for them."""
    for n, (words, named) in enumerate(asked):
        page.box(24, 48 + 46 * n, 176, 38, fill=SAND, edge=ORANGE)
        page.text(34, 64 + 46 * n, words, size=13)
        page.text(34, 80 + 46 * n, named, size=13, color=GREY)
        page.arrow((200, 67 + 46 * n), (259, 67 + 46 * n))
    page.box(260, 16, 516, 170)
    page.text(276, 40, f"**{title}**")
    page.labelled(276, 54, 226, 50, above)
    page.labelled(276, 122, 226, 50, below, fill=PALE, edge=BLUE)
    page.arrow((502, 79), (559, 103))
    page.arrow((502, 147), (559, 123), color=BLUE)
    page.labelled(560, 88, 200, 50, result)


PICTURES: dict[str, Callable[[], Picture]] = {
    "way.svg": way,
    "ragged.svg": ragged,
    "refit.svg": refit,
    "server.svg": server,
    "vllm.svg": vllm,
}
"""The files in docs/ and what draws them."""


def main() -> None:
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
