"""Answers from 60% of the heads' context, chosen without a single scoring pass over the document.

    python examples/head_scores.py [MODEL] [--text FILE ...]

Head scores come with the library for the small models; --text makes them for any model, from one or several texts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import kvzip
import museum
from kvzip import head_scores

SINK, RECENT = 16, 64  # tokens that the other heads keep of the document's beginning and end


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    parser = museum.parser(__doc__)
    parser.set_defaults(ratio=head_scores.RECOMMENDED_RATIO)
    parser.add_argument("--text", nargs="+", type=Path, help="make the head scores from these files")
    arguments = parser.parse_args(argv)
    model = museum.load(arguments.model)
    if arguments.text:
        texts = [path.read_text(encoding="utf-8") for path in arguments.text]
        scores = head_scores.make(model, texts, names=[p.name for p in arguments.text], template=bool(model.template))
    else:
        scores = head_scores.shipped(model)
    for source in scores.sources:
        print(f"scores from {source.tokens:,} tokens of {source.name}")
    print(head_map(scores, arguments.ratio))

    full = kvzip.prefill(model, arguments.document.read_text(encoding="utf-8").strip(), template=False)
    scored = head_scores.attach(full, scores)
    small = kvzip.compress(scored, arguments.ratio, level="head", sink=SINK, recent=RECENT)
    print(f"{small.kept / small.total:.0%} of the pairs kept, {museum.megabytes(full)} -> {museum.megabytes(small)}\n")
    museum.ask_five(model, small, arguments.tokens)
    return 0


def head_map(scores: head_scores.HeadScores, ratio: float) -> str:
    """Returns a map with a row for each KV head and a column for each scored layer."""
    kept = kvzip.ops.select(scores.values[:, :, None], ratio=ratio)
    assert isinstance(kept, torch.Tensor)
    rows = ["".join("\u2588" if layer else "\u2591" for layer in head) for head in kept[:, :, 0].T.tolist()]
    lines = ["layers from left to right: \u2588 keeps the document, \u2591 does not"]
    return "\n".join([*lines, *(f"head {head:<3}{row}" for head, row in enumerate(rows))])


if __name__ == "__main__":
    sys.exit(main())
